"""From the arguments of attention's backward to its launches; see plans.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...bundles import Geometry, Packing, Rotation
from . import configs
from .arguments import Sequences, attention_arguments, empty_like, packed_view, strides, unpacked
from .backward import backward_key_kernel, backward_query_kernel, delta_kernel
from .configs import pad
from .launch import Launch
from .plans import rotate, rotate_keys, row_width

# Gradients of query, key and value; partial sums of d inv_freq, each with the regime of its rows; the launches.
Plan = tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]], list[Launch]]


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
    target: str,
) -> Plan:
    """Return (dq, dk, dv), partial sums of d inv_freq (none unless wanted), and the launches that fill them.

    A partial sum is fp64 [n, m, P] beside int32 [n], the regimes of its rows.
    """
    sequences = Sequences.of_batch(query, key.shape[2], geometry)
    # Slots outside every sequence belong to no program.
    padded = geometry.key_start is not None or geometry.key_length is not None
    return _plan(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        rotation,
        geometry,
        sequences,
        want_inv_freq,
        target,
        padded,
    )


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
    target: str,
) -> Plan:
    """The same of packed operands [T, H, D]."""
    grad_out, query, key, value, out = (packed_view(x) for x in (grad_out, query, key, value, out))
    grad_lse, lse = None if grad_lse is None else grad_lse.unsqueeze(0), lse.unsqueeze(0)
    gradients, partials, launches = _plan(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        rotation,
        geometry,
        Sequences.of_packing(packing, query.shape[2], key.shape[2]),
        want_inv_freq,
        target,
        False,
    )
    d_query, d_key, d_value = (unpacked(x) for x in gradients)
    return (d_query, d_key, d_value), partials, launches


def _plan(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    sequences: Sequences,
    want_inv_freq: bool,
    target: str,
    padded: bool,
) -> Plan:
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads, key_tokens = key.shape[1], key.shape[2]
    pairs = rotation.turns.shape[-1]
    packed = sequences.query_count is not None
    grad_query, grad_key, grad_value = (empty_like(x, packed) for x in (query, key, value))
    gradients = (grad_query, grad_key, grad_value)
    empty = query.numel() == 0 or key.numel() == 0
    if padded or empty:
        grad_key.zero_(), grad_value.zero_()
    if empty:
        grad_query.zero_()
        return gradients, [], []

    grad_out = grad_out if grad_out.stride(-1) == 1 or head_dim == 1 else grad_out.contiguous()
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    delta, launch = _delta(grad_out, grad_lse, out, lse, target)
    launches = [launch]
    if pairs:
        rows = None
        if sequences.query_slot is not None and sequences.query_count is not None:
            rows = (sequences.query_slot, sequences.query_count)
        rotated_query, launch = rotate(
            query,
            rotation,
            geometry.query_positions,
            sequences.query_start,
            False,
            target,
            scratch=True,
            packed=rows,
        )
        launches.append(launch)
        rotated_key, launch = rotate_keys(key, rotation, geometry, sequences, target)
        launches.append(launch)
    else:
        # Kernels read padded rows without a mask.
        fill = (0, pad(head_dim) - head_dim)
        rotated_query, rotated_key = (torch.nn.functional.pad(x, fill) if fill[1] else x for x in (query, key))

    shared: dict[str, Any] = {
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        **strides("grad_out", grad_out),
        "scale": geometry.scale,
        "WANT_TURNS": want_inv_freq and pairs > 0,
        "HEAD_DIM": head_dim,
        "VALUE_BLOCK": pad(head_dim),
        "REST_BLOCK": pad(head_dim - 2 * pairs),
    }
    partials: list[tuple[Tensor, Tensor]] = []

    def sums(blocks: int, block_sequence: Tensor | None) -> Tensor:
        """One row of partial sums for each program, or a stand-in of the same type."""
        if not shared["WANT_TURNS"]:
            return rotation.inv_freq
        if block_sequence is None:
            rows = query.new_empty((batch, key_heads * blocks, pairs), dtype=torch.float64)
            partials.append((rows, rotation.regime_index))
            return rows
        # Blocks that no sequence needs write nothing.
        rows = query.new_zeros((key_heads, blocks, pairs), dtype=torch.float64)
        partials.append((rows.transpose(0, 1), rotation.regime_index[block_sequence.long()]))
        return rows

    extras = shared["WANT_TURNS"] or geometry.softcap > 0
    group = query_heads // key_heads
    config = configs.backward_query(target, row_width(query, rotation), query.element_size(), extras)
    arguments = attention_arguments(rotated_query, rotated_key, value, rotation, geometry, sequences, config)
    row_blocks, blocks = sequences.query_blocks(query_tokens, group, config.rows)
    arguments |= shared | blocks | {"row_blocks": row_blocks, "grad_query": grad_query}
    arguments |= {**strides("grad_query", grad_query), "grad_turns": sums(row_blocks, blocks["block_sequence"])}
    launches.append(Launch(backward_query_kernel, (batch * key_heads * row_blocks,), arguments, config))

    config = configs.backward_key(target, row_width(query, rotation), query.element_size(), extras)
    arguments = attention_arguments(rotated_query, rotated_key, value, rotation, geometry, sequences, config)
    key_blocks, blocks = sequences.key_blocks(key_tokens, config.keys)
    arguments |= shared | blocks | {"key_blocks": key_blocks, "grad_key": grad_key, "grad_value": grad_value}
    arguments |= {"key_tokens": key_tokens, "GROUP": group}
    arguments |= {**strides("grad_key", grad_key), **strides("grad_value", grad_value)}
    arguments |= {"grad_turns": sums(key_blocks, blocks["block_sequence"])}
    launches.append(Launch(backward_key_kernel, (batch * key_heads * key_blocks,), arguments, config))
    return gradients, partials, launches


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, target: str) -> tuple[Tensor, Launch]:
    """Rowsum(dO O) - d lse, fp32 [B, Hq, Tq]."""
    batch, heads, tokens, head_dim = out.shape
    config = configs.delta(target)
    token_blocks = -(-tokens // config.rows)
    delta = torch.empty_like(lse, dtype=torch.float32)
    arguments = {
        "out": out,
        "grad_out": grad_out,
        "lse": lse,
        "grad_lse": delta if grad_lse is None else grad_lse,
        "delta": delta,
        **strides("out", out),
        **strides("grad_out", grad_out),
        "query_heads": heads,
        "query_tokens": tokens,
        "token_blocks": token_blocks,
        "HEAD_DIM": head_dim,
        "VALUE_BLOCK": pad(head_dim),
        "HAS_GRAD_LSE": grad_lse is not None,
        "BLOCK_ROWS": config.rows,
    }
    return delta, Launch(delta_kernel, (batch * heads * token_blocks,), arguments, config)


def frequency_gradient(partials: list[tuple[Tensor, Tensor]], inv_freq: Tensor) -> Tensor:
    """Sum partial sums into d inv_freq fp64[R, P], in an order that is fixed (index_add_ on a GPU has none)."""
    total = torch.zeros_like(inv_freq)
    regimes = torch.arange(inv_freq.shape[0], device=inv_freq.device).unsqueeze(1)
    for rows, regime in partials:
        of_regime = (regime.unsqueeze(0) == regimes).unsqueeze(-1)
        total = total + torch.where(of_regime, rows.sum(1).unsqueeze(0), 0.0).sum(1)
    return total
