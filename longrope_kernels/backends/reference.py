"""The definition: non-uniform RoPE and attention in float64, eager torch, block by block so that length is no limit.

Angles come from the same 64-bit fixed-point frequencies as in every backend, so that a comparison sees a kernel's
arithmetic and not another idea of the angle. Everything else is the formula, in float64; nothing is rounded on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bundles import LARGEST, Geometry, Packing, Pages, Rotation, lse_dtype
from . import composed

NAME = "reference"
QUANTISED = tuple(LARGEST)
_TURN = 2 * math.pi / 2**32  # radians in one unit of phase
_BLOCK = 512  # query rows held at once


def unavailable_reason() -> str | None:
    """Return None: torch is all it needs."""
    return None


def supports(op: str, query: Tensor) -> str | None:
    """Return None: every shape and dtype."""
    return None


def phase(rotation: Rotation, positions: Tensor) -> Tensor:
    """Return the angle of every pair in units of 2^-32 turn, in [-2^31, 2^31).

    Args:
        rotation: tables of R regimes over P pairs.
        positions: int64[B, T].

    Returns:
        int64[B, T, P].
    """
    regime = rotation.regime_index.long()
    turns, base = rotation.turns[regime], rotation.base_turns[regime]  # [B, P]
    below = positions < rotation.start_tokens[regime].unsqueeze(1)
    frequency = torch.where(below.unsqueeze(-1), base.unsqueeze(1), turns.unsqueeze(1))
    return (positions.unsqueeze(-1) * frequency) >> 32  # int64 products wrap: reduction modulo a turn


def cos_sin(rotation: Rotation, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention_factor * cos and sin, float64[B, 1, T, P], at int64[B, T] positions."""
    angle = phase(rotation, positions).double() * _TURN
    factor = rotation.attention_factor[rotation.regime_index.long()].double().view(-1, 1, 1)
    return (angle.cos() * factor).unsqueeze(1), (angle.sin() * factor).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of x [B, H, T, D] by [B, 1, T, P] cos and sin; dims past 2P pass through."""
    pairs = cos.shape[-1]
    rotary, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
    else:
        a, b = rotary[..., :pairs], rotary[..., pairs:]
    turned = (a * cos - b * sin, b * cos + a * sin)
    rotary = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotary, rest), dim=-1)


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotate query [B, Hq, Tq, D] and key [B, Hkv, Tk, D] at int64[B, T] positions; `conjugate` rotates back."""

    def one(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = cos_sin(rotation, positions)
        return rotate(x.double(), cos, -sin if conjugate else sin, rotation.interleaved).to(x.dtype)

    if key is None:
        return one(query, query_positions), None
    assert key_positions is not None
    return one(query, query_positions), one(key, key_positions)


def apply_rope_in_place(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> None:
    """The same, written over the operands."""
    rotated, rotated_key = apply_rope(query, key, rotation, query_positions, key_positions, conjugate)
    query.copy_(rotated)
    if key is not None and rotated_key is not None:
        key.copy_(rotated_key)


class _Problem:
    """Rotated float64 operands, and the visible interval of every query row."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry) -> None:
        batch, self.query_heads, query_tokens, _ = query.shape
        self.key_heads, key_tokens = key.shape[1], key.shape[2]
        self.group = self.query_heads // max(self.key_heads, 1)
        self.geometry = geometry
        query_start, key_start, key_length = geometry.resolved(batch, query_tokens, key_tokens, query.device)
        row = query_start.unsqueeze(1) + torch.arange(query_tokens, device=query.device)
        slot = torch.arange(key_tokens, device=query.device) - key_start.unsqueeze(1)
        self.slot_index = slot  # [B, Tk], the index of each key in its sequence
        self.low, self.high = geometry.visible(row, key_length.unsqueeze(1))  # [B, Tq]
        self.query_positions = row if geometry.query_positions is None else geometry.query_positions
        self.key_positions = slot if geometry.key_positions is None else geometry.key_positions
        self.query_cos, self.query_sin = cos_sin(rotation, self.query_positions)
        self.key_cos, self.key_sin = cos_sin(rotation, self.key_positions)
        self.query = rotate(query.double(), self.query_cos, self.query_sin, rotation.interleaved)
        self.key = self.expand(rotate(key.double(), self.key_cos, self.key_sin, rotation.interleaved))
        # Slots outside the sequence may hold anything, NaN included, and must not reach a product.
        self.inside = ((slot >= 0) & (slot < key_length.unsqueeze(1))).view(batch, 1, key_tokens, 1)
        self.key = self.key.masked_fill(~self.inside, 0.0)
        self.value = self.expand(value.double()).masked_fill(~self.inside, 0.0)

    def expand(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.group, dim=1)

    def reduce(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.key_heads, self.group)).sum(2) if self.key_heads else x[:, :0]

    def blocks(self) -> list[slice]:
        tokens = self.query.shape[2]
        return [slice(start, min(start + _BLOCK, tokens)) for start in range(0, tokens, _BLOCK)]

    def scores(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores [B, H, rows, Tk] with -inf where masked, their softcap's slope, and the visibility mask."""
        scores = self.query[:, :, rows] @ self.key.mT * self.geometry.scale
        slope = torch.ones_like(scores)
        if self.geometry.softcap:
            bounded = torch.tanh(scores / self.geometry.softcap)
            scores, slope = self.geometry.softcap * bounded, 1 - bounded * bounded
        index = self.slot_index[:, None, None, :]
        low, high = self.low[:, None, rows, None], self.high[:, None, rows, None]
        visible = (index >= low) & (index < high)
        return scores.masked_fill(~visible, -math.inf), slope, visible


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Attention over rotated queries and keys.

    Args:
        query: [B, Hq, Tq, D]. key, value: [B, Hkv, Tk, D], Hq a multiple of Hkv.

    Returns:
        out like query, and lse [B, Hq, Tq], float32 (float64 for float64 operands), natural log. A row that sees no
        key has out 0 and lse -inf.
    """
    problem = _Problem(query, key, value, rotation, geometry)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full(query.shape[:-1], -math.inf, dtype=lse_dtype(query), device=query.device)
    for rows in problem.blocks():
        scores, _, _ = problem.scores(rows)
        row_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - _finite(row_lse).unsqueeze(-1))
        out[:, :, rows] = (weights @ problem.value).to(query.dtype)
        lse[:, :, rows] = row_lse.to(lse.dtype)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`: P = exp(S - lse), dS = P (dP - D), D = rowsum(dO O) - dlse.

    `out` and `lse` may be those of the same queries over more keys than these; the gradients are then what these keys
    contribute to those of the whole.

    Returns:
        dq, dk, dv like query, key, value, and d inv_freq float64[R, P] (zeros unless asked for).
    """
    problem = _Problem(query, key, value, rotation, geometry)
    d_query = torch.zeros_like(problem.query)
    d_key = torch.zeros_like(problem.key)
    d_value = torch.zeros_like(problem.value)
    for rows in problem.blocks():
        scores, slope, visible = problem.scores(rows)
        row_lse = lse[:, :, rows].double()
        weights = torch.exp(scores - _finite(row_lse).unsqueeze(-1))
        block_grad = grad_out[:, :, rows].double()
        d_weights = block_grad @ problem.value.mT
        delta = (block_grad * out[:, :, rows].double()).sum(-1)
        if grad_lse is not None:
            delta = delta - torch.where(row_lse.isinf(), 0.0, grad_lse[:, :, rows].double())
        d_scores = weights * (d_weights - delta.unsqueeze(-1)) * slope * geometry.scale
        d_scores = d_scores.masked_fill(~visible, 0.0)
        d_query[:, :, rows] = d_scores @ problem.key
        d_key += d_scores.mT @ problem.query[:, :, rows]
        d_value += weights.mT @ block_grad

    d_key, d_value = problem.reduce(d_key), problem.reduce(d_value)
    d_inv_freq = torch.zeros_like(rotation.inv_freq)
    if want_inv_freq:
        rotated_key = rotate(key.double(), problem.key_cos, problem.key_sin, rotation.interleaved)
        rotated_key = rotated_key.masked_fill(~problem.inside, 0.0)
        d_inv_freq = inv_freq_gradient(problem.query, d_query, problem.query_positions, rotation)
        d_inv_freq += inv_freq_gradient(rotated_key, d_key, problem.key_positions, rotation)
    d_query = rotate(d_query, problem.query_cos, -problem.query_sin, rotation.interleaved)
    d_key = rotate(d_key, problem.key_cos, -problem.key_sin, rotation.interleaved)
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), d_inv_freq


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing
) -> tuple[Tensor, Tensor]:
    """`attention` of packed sequences: query [Tq, Hq, D], key and value [Tk, Hkv, D]; lse [Hq, Tq]."""
    return composed.attention_varlen(attention, query, key, value, rotation, geometry, packing)


def attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen`."""
    return composed.attention_varlen_backward(
        attention_backward, grad_out, grad_lse, query, key, value, out, lse, rotation, geometry, packing, want_inv_freq
    )


def attention_paged(query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """`attention` of queries [B, Hq, Tq, D] over a cache."""
    return composed.attention_paged(attention, query, pages, rotation, geometry)


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write the first `count[b]` of key and value [B, Hkv, T, D] behind the `length[b]` tokens of the cache."""
    composed.cache_append(key, value, pages, count)


def inv_freq_gradient(rotated: Tensor, gradient: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Sum over positions p >= n-hat of p * (a db - b da), the gradient of the rescaled inverse frequencies.

    Args:
        rotated: [B, H, T, D], its pairs (a, b) already rotated. gradient: (da, db), of the same shape.
        positions: int64[B, T].

    Returns:
        float64[R, P], each sequence added to the row of its regime.
    """
    pairs = rotation.turns.shape[-1]
    if rotation.interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    x, g = rotated.double(), gradient.double()
    cross = x[..., first] * g[..., second] - x[..., second] * g[..., first]
    regime = rotation.regime_index.long()
    reached = positions >= rotation.start_tokens[regime].unsqueeze(1)
    weight = torch.where(reached, positions, 0).double()
    total = torch.zeros_like(rotation.inv_freq)
    return total.index_add_(0, regime, torch.einsum("bhtp,bt->bp", cross, weight))


def _finite(lse: Tensor) -> Tensor:
    return torch.where(lse.isinf(), 0.0, lse)
