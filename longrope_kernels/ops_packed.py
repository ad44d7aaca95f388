"""The `torch.library` ops of packed batches (`attention_varlen`) and of caches (`attention_paged`, `cache_append`).

As in `ops.py`: tensors and numbers only, values checked inside the op before any memory is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .bundles import Geometry, Packing, Pages, Rotation, lse_dtype


@torch.library.custom_op("longrope_kernels::attention_varlen", mutates_args=())
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences: out like query [Tq, Hq, D] and lse [Hq, Tq]; positions [1, T]."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    geometry = _geometry(query_positions, key_positions, None, scale, is_causal, window_left, window_right, softcap)
    packing = Packing(cu_seqlens_q, cu_seqlens_k)
    _check_packed(query, key, rotation, geometry, packing)
    module = backends.pick("attention_varlen", query, key.shape[0], backend)
    return module.attention_varlen(query, key, value, rotation, geometry, packing)


@attention_varlen.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype(query))


@torch.library.custom_op("longrope_kernels::attention_varlen_backward", mutates_args=())
def attention_varlen_backward(
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
    want_inv_freq: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen`: d query, d key, d value, and d inv_freq float64[R, P] (zeros unless wanted)."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    geometry = _geometry(query_positions, key_positions, None, scale, is_causal, window_left, window_right, softcap)
    packing = Packing(cu_seqlens_q, cu_seqlens_k)
    _check_packed(query, key, rotation, geometry, packing)
    module = backends.pick("attention_varlen_backward", query, key.shape[0], backend)
    return module.attention_varlen_backward(
        grad_out, grad_lse, query, key, value, out, lse, rotation, geometry, packing, want_inv_freq
    )


@attention_varlen_backward.register_fake
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
    return tuple(x.new_empty(x.shape) for x in (query, key, value, inv_freq))  # type: ignore[return-value]


def _varlen_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.numbers = inputs[13:]
    ctx.inv_freq_gradient = ctx.needs_input_grad[5]


def _varlen_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    query, key, value, *rest, out, lse = ctx.saved_tensors
    *numbers, backend = ctx.numbers
    d_query, d_key, d_value, d_inv_freq = attention_varlen_backward(
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
    return d_query, d_key, d_value, None, None, d_inv_freq if ctx.inv_freq_gradient else None, *[None] * 14


attention_varlen.register_autograd(_varlen_backward, setup_context=_varlen_context)


@torch.library.custom_op("longrope_kernels::attention_paged", mutates_args=())
def attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    length: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_tail: Tensor | None,
    turns: Tensor,
    base_turns: Tensor,
    inv_freq: Tensor,
    start_tokens: Tensor,
    attention_factor: Tensor,
    regime_index: Tensor,
    query_positions: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, Hq, Tq, D] over a cache of unrotated keys: out like query and lse [B, Hq, Tq]."""
    rotation = Rotation(turns, base_turns, inv_freq, start_tokens, attention_factor, regime_index, interleaved)
    geometry = _geometry(query_positions, None, query_start, scale, is_causal, window_left, window_right, softcap)
    pages = Pages(key_pages, value_pages, block_table, length, key_scale, value_scale, key_tail)
    checks.rotation_values(rotation)
    checks.geometry_values(geometry, query.shape[0], query.shape[2], 0)
    checks.page_values(pages, length)
    module = backends.pick("attention_paged", query, pages.capacity, backend, key_pages.dtype)
    return module.attention_paged(query, pages, rotation, geometry)


@attention_paged.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=lse_dtype(query))


@torch.library.custom_op(
    "longrope_kernels::cache_append",
    mutates_args=("key_pages", "value_pages", "key_scale", "value_scale", "key_tail"),
)
def cache_append(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    length: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_tail: Tensor | None,
    count: Tensor,
    backend: str,
) -> None:
    """Write the first count[b] tokens of key and value [B, Hkv, T, D] behind the length[b] tokens of the cache."""
    pages = Pages(key_pages, value_pages, block_table, length, key_scale, value_scale, key_tail)
    checks.append_values(pages, count, key.shape[2])
    module = backends.pick("cache_append", key, pages.capacity, backend, key_pages.dtype)
    module.cache_append(key, value, pages, count)


@cache_append.register_fake
def _(*arguments: Any) -> None:
    return None


def _geometry(
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> Geometry:
    return Geometry(
        query_positions, key_positions, query_start, None, None, scale, is_causal, window_left, window_right, softcap
    )


def _check_packed(query: Tensor, key: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing) -> None:
    checks.rotation_values(rotation)
    checks.position_values("query_positions", geometry.query_positions)
    checks.position_values("key_positions", geometry.key_positions)
    checks.bounds_values("cu_seqlens_q", packing.query_bounds, query.shape[0], "query")
    checks.bounds_values("cu_seqlens_k", packing.key_bounds, key.shape[0], "key")
