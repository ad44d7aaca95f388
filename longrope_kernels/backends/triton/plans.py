"""From the arguments of an op to the launches that compute it. Nothing runs here, and a meta tensor will do.

The backward's launches are in plans_backward.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...bundles import KEY_GROUP, Geometry, Packing, Pages, Rotation
from ...errors import refuse
from . import configs
from .append import append_kernel, tail_kernel
from .arguments import (
    Sequences,
    attention_arguments,
    cache_arguments,
    empty_like,
    head_constants,
    packed_view,
    read,
    strides,
    tables,
    unit_last,
    unpacked,
    written,
)
from .configs import Config, pad, width
from .decode import combine_kernel, decode_kernel
from .descriptors import NONE, key_tiles
from .forward import forward_kernel
from .launch import Launch
from .rope import rotate_kernel


def rotate(
    x: Tensor,
    rotation: Rotation,
    positions: Tensor | None,
    first_index: Tensor | None,
    conjugate: bool,
    target: str,
    scratch: bool = False,
    packed: tuple[Tensor, Tensor] | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Launch]:
    """Rotate x [B, H, T, D] at int64[B, T] positions, or from int64[B] `first_index` on.

    `packed`: the first row and the tokens of each sequence of x [1, H, T, D].

    Returns:
        The result, like x or in the scratch layout [B, H, T, width], and the launch that fills it; x itself `in_place`.
    """
    batch, heads, tokens, head_dim = x.shape
    pairs = rotation.turns.shape[-1]
    row = width(head_dim, pairs)
    out = x if in_place else x.new_empty((batch, heads, tokens, row if scratch else head_dim))
    config = configs.rotate(target, row)
    slots, counts = packed if packed is not None else (None, None)
    bounds = Sequences(rotation.start_tokens, rotation.start_tokens, rotation.start_tokens, slots, counts)
    token_blocks, blocks = bounds.query_blocks(tokens, 1, config.rows)
    # All heads in one program share its angles; with few tokens, heads are what there is to spread over a GPU.
    in_program = heads if batch * token_blocks >= 256 else min(heads, 4)
    positions = unit_last(positions)
    other = first_index if first_index is not None else rotation.start_tokens
    arguments = {
        "x": x,
        "out": out,
        **tables(rotation),
        "positions": positions if positions is not None else other,
        "first_index": other,
        "slots": slots,
        "counts": counts,
        **blocks,
        **strides("x", x),
        **strides("out", out),
        "positions_batch_stride": positions.stride(0) if positions is not None else 0,
        "heads": heads,
        "tokens": tokens,
        "token_blocks": token_blocks,
        "heads_in_program": in_program,
        **head_constants(x, rotation),
        "INTERLEAVED": rotation.interleaved,
        "CONJUGATE": conjugate,
        "HAS_POSITIONS": positions is not None,
        "TO_SCRATCH": scratch,
        "IN_PLACE": in_place,
        "BLOCK": config.rows,
    }
    grid = (batch * token_blocks, -(-heads // in_program) if heads else 0)
    return out, Launch(rotate_kernel, grid, arguments, config)


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, target: str
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return out, lse and the launches that fill them."""
    sequences = Sequences.of_batch(query, key.shape[2], geometry)
    if configs.splits_keys(query.shape[2] * (query.shape[1] // max(key.shape[1], 1))):
        return _split(query, key, value, rotation, geometry, sequences, target, None)
    return _whole(query, key, value, rotation, geometry, sequences, target, None)


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing, target: str
) -> tuple[Tensor, Tensor, list[Launch]]:
    """The same of packed operands [T, H, D]. How long a sequence is, the host does not know: keys are never split."""
    query, key, value = (packed_view(x) for x in (query, key, value))
    sequences = Sequences.of_packing(packing, query.shape[2], key.shape[2])
    out, lse, launches = _whole(query, key, value, rotation, geometry, sequences, target, None)
    return unpacked(out), lse[0], launches


def attention_paged(
    query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry, target: str
) -> tuple[Tensor, Tensor, list[Launch]]:
    """The same over a cache. Keys are rotated in the tile: a scratch copy would be as large as the pool's capacity."""
    sequences = Sequences.of_pages(query, pages, geometry)
    kernels = _split if configs.splits_keys(query.shape[2] * (query.shape[1] // pages.key.shape[1])) else _whole
    key, value = (read(x, target) for x in (pages.key, pages.value))
    return kernels(query, key, value, rotation, geometry, sequences, target, pages)


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> list[Launch]:
    """Return the launches that write the first `count[b]` tokens of key and value behind those of the cache."""
    batch, key_heads, tokens, head_dim = key.shape
    config = configs.append()
    groups = (tokens + KEY_GROUP - 2) // KEY_GROUP + 1  # that tokens can touch, wherever they begin
    shared = {
        "key": key,
        "length": pages.length.contiguous(),
        "count": count.contiguous(),
        **strides("key", key),
        "key_heads": key_heads,
        "tokens": tokens,
        "HEAD_DIM": head_dim,
        "VALUE_BLOCK": pad(head_dim),
        **cache_arguments(pages, config),
    }
    arguments = shared | {
        "value": value,
        **strides("value", value),
        "key_pages": written(pages.key),
        "value_pages": written(pages.value),
        **strides("key_pages", pages.key),
        **strides("value_pages", pages.value),
        "groups": groups,
    }
    programs = batch * key_heads if tokens else 0
    launches = [Launch(append_kernel, (programs * groups,), arguments, config)]
    if pages.quantised:
        launches.append(Launch(tail_kernel, (programs,), shared, config))
    return launches


def _format(pages: Pages | None) -> str:
    """Return the word for a quantised cache in the names of configurations."""
    return "" if pages is None or not pages.quantised else "int8" if pages.key.dtype == torch.int8 else "fp8"


def row_width(query: Tensor, rotation: Rotation) -> int:
    """Dims of the widest tile of a head, by which configurations are picked."""
    head_dim = query.shape[-1]
    return max(width(head_dim, rotation.turns.shape[-1]), pad(head_dim))


def _split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    sequences: Sequences,
    target: str,
    pages: Pages | None,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Few rows: runs of keys side by side, then the merge of their partial results."""
    batch, query_heads, query_tokens, head_dim = query.shape
    key_heads = key.shape[1]
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, []
    group = query_heads // key_heads
    rows = query_tokens * group
    shares = configs.shares_rotations(query_tokens, group, geometry.key_positions is not None)
    if shares:
        config = configs.decode(target, row_width(query, rotation), query.element_size(), _format(pages))
    else:
        config = configs.forward_split(target, row_width(query, rotation), query.element_size(), rows)
    key_tokens = key.shape[2] if pages is None else pages.capacity
    splits = max(1, -(-key_tokens // configs.SPLIT_KEYS))
    if splits > configs.MOST_SPLITS:
        what = f"{key_tokens} tokens beside {rows} rows of queries"
        refuse("key", what, f"at most {configs.MOST_SPLITS * configs.SPLIT_KEYS} where so few rows split the keys")
    partial = query.new_empty((batch, key_heads, splits, rows, head_dim), dtype=torch.float32)
    partial_lse = query.new_empty((batch, key_heads, splits, rows), dtype=torch.float32)
    arguments = attention_arguments(query, key, value, rotation, geometry, sequences, config)
    arguments |= cache_arguments(pages, config) | {"splits": splits, "SPLIT": configs.SPLIT_KEYS}
    row_blocks, blocks = sequences.query_blocks(query_tokens, group, config.rows)
    if shares:
        kernel: Any = decode_kernel
        arguments |= {"partial": partial, "partial_lse": partial_lse}
    else:
        kernel = forward_kernel
        arguments |= blocks | {"row_blocks": row_blocks, "out": partial, "lse": partial_lse, "ROTATE_KEY": True} | NONE
        arguments |= strides("out", partial)
    launches = [Launch(kernel, (batch * key_heads * row_blocks, splits), arguments, config)]
    merge = {
        "partial": partial,
        "partial_lse": partial_lse,
        "out": out,
        "lse": lse,
        **strides("out", out),
        "key_heads": key_heads,
        "group": group,
        "query_tokens": query_tokens,
        "splits": splits,
        "HEAD_DIM": head_dim,
        "VALUE_BLOCK": pad(head_dim),
        "BLOCK_SPLITS": 16,
    }
    launches.append(Launch(combine_kernel, (batch * key_heads * rows,), merge, Config(1, 16, 4, 1)))
    return out, lse, launches


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    sequences: Sequences,
    target: str,
    pages: Pages | None,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Many rows: each block of them walks all keys it sees."""
    batch, query_heads, query_tokens, _ = query.shape
    key_heads, pairs = key.shape[1], rotation.turns.shape[-1]
    packed = sequences.query_count is not None
    out = empty_like(query, packed)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, []
    group = query_heads // key_heads
    in_tile = pairs == 0 or pages is not None or (not packed and configs.rotates_in_tile(query_tokens * group))
    plain = geometry.softcap == 0.0 and pages is None and (pairs == 0 or not in_tile)
    config = configs.forward(target, row_width(query, rotation), query.element_size(), plain, _format(pages))
    launches = []
    if not in_tile:
        key, launch = rotate_keys(key, rotation, geometry, sequences, target)
        launches.append(launch)
    arguments = attention_arguments(query, key, value, rotation, geometry, sequences, config)
    row_blocks, blocks = sequences.query_blocks(query_tokens, group, config.rows)
    arguments |= blocks | cache_arguments(pages, config)
    arguments |= {"out": out, "lse": lse, **strides("out", out), "splits": 1, "SPLIT": 0, "ROTATE_KEY": in_tile}
    arguments |= {"row_blocks": row_blocks, "HAS_KEY_POSITIONS": arguments["HAS_KEY_POSITIONS"] and in_tile}
    tiles = key_tiles(key, value, config, arguments) if not in_tile or (pages is None and pairs == 0) else NONE
    config = replace(config, descriptors=tiles["TILES"])
    launches.append(Launch(forward_kernel, (batch * key_heads * row_blocks,), arguments | tiles, config))
    return out, lse, launches


def rotate_keys(
    key: Tensor, rotation: Rotation, geometry: Geometry, sequences: Sequences, target: str
) -> tuple[Tensor, Launch]:
    """Keys rotated once into the scratch layout."""
    first, packed = -sequences.key_start, None
    if sequences.query_count is not None:
        first, packed = torch.zeros_like(sequences.key_start), (sequences.key_start, sequences.key_length)
    return rotate(key, rotation, geometry.key_positions, first, False, target, scratch=True, packed=packed)
