"""The `torch.library` ops: schemas, fake implementations and autograd formulas, in tensors and numbers only.

A rotation travels as its six tables and a geometry as its five optional tensors and five numbers, so one compiled
graph serves any scaling of the same shape. `backend` is a name or "" for the one `backends.pick` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backends.reference import inv_freq_gradient
from .bundles import Geometry, Rotation, lse_dtype


@torch.library.custom_op("longrope_kernels::apply_rope", mutates_args=())
def apply_rope(
    query: Tensor,
    key: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    interleaved: bool,
    conjugate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Rotate query [B, Hq, Tq, D] and key [B, Hkv, Tk, D] at int64[B, T] positions; zero key heads: query alone."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    checks.rotation_values(rotation)
    checks.position_values("positions", query_positions)
    checks.position_values("key_positions", key_positions)
    module = backends.pick("apply_rope", query, key.shape[2], backend)
    if key.shape[1] == 0:
        return module.apply_rope(query, None, rotation, query_positions, None, conjugate)[0], torch.empty_like(key)
    return module.apply_rope(query, key, rotation, query_positions, key_positions, conjugate)


@torch.library.custom_op("longrope_kernels::apply_rope_in_place", mutates_args=("query", "key"))
def apply_rope_in_place(
    query: Tensor,
    key: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    interleaved: bool,
    conjugate: bool,
    backend: str,
) -> None:
    """`apply_rope` over its operands, of which no two elements share memory. Not differentiable."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    checks.rotation_values(rotation)
    checks.position_values("positions", query_positions)
    checks.position_values("key_positions", key_positions)
    checks.written_over(query, key)
    module = backends.pick("apply_rope_in_place", query, key.shape[2], backend)
    if key.shape[1] == 0:
        module.apply_rope_in_place(query, None, rotation, query_positions, None, conjugate)
    else:
        module.apply_rope_in_place(query, key, rotation, query_positions, key_positions, conjugate)


@apply_rope_in_place.register_fake
def _(*arguments: Any) -> None:
    return None


@apply_rope.register_fake
def _(query: Tensor, key: Tensor, *tables: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _apply_rope_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, *tables, query_positions, key_positions, interleaved, conjugate, backend = inputs
    rotated = output if ctx.needs_input_grad[4] else ()
    ctx.save_for_backward(*tables, query_positions, key_positions, *rotated)
    ctx.flags = (interleaved, conjugate, backend)


def _apply_rope_backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    tables, (query_positions, key_positions) = ctx.saved_tensors[:6], ctx.saved_tensors[6:8]
    rotated = ctx.saved_tensors[8:]
    interleaved, conjugate, backend = ctx.flags
    grad_inv_freq = None
    if rotated:
        turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index = tables
        rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
        grad_inv_freq = inv_freq_gradient(rotated[0], grad_query, query_positions, rotation)
        grad_inv_freq = grad_inv_freq + inv_freq_gradient(rotated[1], grad_key, key_positions, rotation)
        if conjugate:
            grad_inv_freq = -grad_inv_freq
    d_query, d_key = apply_rope(
        grad_query.contiguous(),
        grad_key.contiguous(),
        *tables,
        query_positions,
        key_positions,
        interleaved,
        not conjugate,
        backend,
    )
    return d_query, d_key, None, None, grad_inv_freq, *[None] * 8


apply_rope.register_autograd(_apply_rope_backward, setup_context=_apply_rope_context)


@torch.library.custom_op("longrope_kernels::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of rotated queries and keys: out like query and lse [B, Hq, Tq]."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    geometry = Geometry(
        query_positions,
        key_positions,
        query_start,
        key_start,
        key_length,
        scale,
        is_causal,
        window_left,
        window_right,
        softcap,
    )
    checks.rotation_values(rotation)
    checks.geometry_values(geometry, query.shape[0], query.shape[2], key.shape[2])
    return backends.pick("attention", query, key.shape[2], backend).attention(query, key, value, rotation, geometry)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=lse_dtype(query))


@torch.library.custom_op("longrope_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_length: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
    want_inv_freq: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`: d query, d key, d value, and d inv_freq float64[R, P] (zeros unless asked for)."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    geometry = Geometry(
        query_positions,
        key_positions,
        query_start,
        key_start,
        key_length,
        scale,
        is_causal,
        window_left,
        window_right,
        softcap,
    )
    checks.rotation_values(rotation)
    checks.geometry_values(geometry, query.shape[0], query.shape[2], key.shape[2])
    module = backends.pick("attention_backward", query, key.shape[2], backend)
    return module.attention_backward(grad_out, grad_lse, query, key, value, out, lse, rotation, geometry, want_inv_freq)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        inv_freq.new_empty(inv_freq.shape),
    )


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, flags = inputs[:14], inputs[14:]
    ctx.save_for_backward(*tensors, *output)
    ctx.flags = flags
    ctx.inv_freq_gradient = ctx.needs_input_grad[5]


def _attention_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    query, key, value, *rest = tensors
    *numbers, backend = ctx.flags
    d_query, d_key, d_value, d_inv_freq = attention_backward(
        grad_out.contiguous(),
        grad_lse.contiguous(),
        query,
        key,
        value,
        out,
        lse,
        *rest,
        *numbers,
        ctx.inv_freq_gradient,
        backend,
    )
    return d_query, d_key, d_value, None, None, d_inv_freq if ctx.inv_freq_gradient else None, *[None] * 15


attention.register_autograd(_attention_backward, setup_context=_attention_context)
