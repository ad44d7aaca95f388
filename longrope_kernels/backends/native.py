"""What the native modules take: addresses, strides and sizes in tuples, from tensors and bundles.

Every function that makes such a tuple also returns the tensors whose memory it names and that must outlive the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bundles import Geometry, Packing, Pages, Rotation

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STORED = {torch.int8: 1, torch.float8_e4m3fn: 2}  # pages of another dtype than the query's


def batch_arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes for a batch, and the tensors that must outlive the call."""
    batch, query_heads, query_tokens, head_dim = query.shape
    starts = [x.contiguous() for x in geometry.resolved(batch, query_tokens, key.shape[2], query.device)]
    return call_arguments(
        [operand(x) for x in (query, key, value, out)],
        (lse.data_ptr(), lse.stride(0), lse.stride(1)),
        (),
        (geometry.query_positions, geometry.key_positions),
        (starts[0], None, None, starts[1], starts[2]),
        (batch, query_heads, key.shape[1], query_tokens, head_dim),
        rotation,
        geometry,
        query.dtype,
    )


def packed_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The same for a packed batch: every sequence has batch stride 0 and begins at its own row."""
    query_count, key_length = packing.query_bounds.diff(), packing.key_bounds.diff()
    longest = int(query_count.max()) if query_count.numel() else 0
    return call_arguments(
        [packed_operand(x) for x in (query, key, value, out)],
        (lse.data_ptr(), 0, lse.stride(0)),
        (),
        (geometry.query_positions, geometry.key_positions),
        (
            key_length - query_count,
            packing.query_bounds.contiguous(),
            query_count,
            packing.key_bounds.contiguous(),
            key_length,
        ),
        (packing.batch, query.shape[1], key.shape[1], longest, query.shape[2]),
        rotation,
        geometry,
        query.dtype,
    )


def cache_arguments(
    query: Tensor, pages: Pages, out: Tensor, lse: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The same for queries [B, Hq, Tq, D] over a cache."""
    length = pages.length.contiguous()
    start = (length - query.shape[2] if geometry.query_start is None else geometry.query_start).contiguous()
    zeros = torch.zeros_like(length)
    in_pages, keep_pages = page_arguments(pages)
    arguments, keep = call_arguments(
        [operand(x) for x in (query, pages.key, pages.value, out)],
        (lse.data_ptr(), lse.stride(0), lse.stride(1)),
        in_pages,
        (geometry.query_positions, None),
        (start, None, None, zeros, length),
        (query.shape[0], query.shape[1], pages.key.shape[1], query.shape[2], query.shape[3]),
        rotation,
        geometry,
        query.dtype,
    )
    return arguments, [*keep, *keep_pages]


def append_arguments(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what appending `count[b]` of key and value [B, Hkv, T, D] to a cache takes."""
    in_pages, keep = page_arguments(pages)
    length, count = pages.length.contiguous(), count.contiguous()
    arguments = (
        *(operand(x) for x in (key, value, pages.key, pages.value)),
        in_pages,
        length.data_ptr(),
        count.data_ptr(),
        (key.shape[0], key.shape[1], key.shape[3]),
        DTYPES[key.dtype],
        torch.get_num_threads(),
    )
    return arguments, [*keep, length, count]


def call_arguments(
    operands: list[tuple[int, ...]],
    lse: tuple[int, int, int],
    pages: tuple[Any, ...],
    positions: tuple[Tensor | None, Tensor | None],
    sequences: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    rotation: Rotation,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call.

    Args:
        positions: of queries and keys, int64[B or 1, T].
        sequences: query_start, query_slot, query_count, key_start, key_length: int64[B], contiguous.
    """
    tables, keep = table_arguments(rotation)
    rows = [None if x is None else x.contiguous() for x in positions]
    arguments = (
        *operands,
        lse,
        tables,
        pages,
        *((0, 0) if x is None else (x.data_ptr(), 0 if x.shape[0] == 1 else x.stride(0)) for x in rows),
        *(0 if x is None else x.data_ptr() for x in sequences),
        sizes,
        geometry.window_left,
        0 if geometry.is_causal else geometry.window_right,
        geometry.scale,
        geometry.softcap,
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    return arguments, [*keep, *(x for x in (*rows, *sequences) if x is not None)]


def packed_operand(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [tokens, heads, head_dim]."""
    return x.data_ptr(), 0, x.stride(1), x.stride(0)


def page_arguments(pages: Pages) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call."""
    table = pages.block_table.contiguous()
    scales = [0 if x is None else x.data_ptr() for x in (pages.key_scale, pages.value_scale)]
    tail = (0, 0, 0, 0) if pages.key_tail is None else operand(pages.key_tail)
    return (table.data_ptr(), table.shape[1], pages.page_tokens, *scales, tail, _STORED.get(pages.key.dtype, 0)), [
        table
    ]


def operand(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def table_arguments(rotation: Rotation) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call."""
    tensors = [
        x.contiguous()
        for x in (
            rotation.turns,
            rotation.base_turns,
            rotation.start_tokens,
            rotation.attention_factor,
            rotation.regime_index,
        )
    ]
    pairs = rotation.turns.shape[-1]
    return (*[x.data_ptr() for x in tensors], pairs, int(rotation.interleaved)), tensors
