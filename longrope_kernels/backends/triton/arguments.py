"""What launches share: where the sequences of a call lie, and the arguments of the kernels by parameter name.

Everything is computed on the device of the operands and nothing is read on the host: a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...bundles import Geometry, Packing, Pages, Rotation
from .configs import Config, has_fp8, pad

_LOG2_E = math.log2(math.e)
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a call lie, each field int64[B].

    What the caller's tensors have past the operands, which the host does not see, ends with them here, before a kernel
    reads it: a bound in the kernels would cost registers.
    """

    query_start: Tensor  # index of the first query
    key_start: Tensor  # first key slot
    key_length: Tensor
    query_slot: Tensor | None = None  # of a packed batch: first row of [1, H, T, D]
    query_count: Tensor | None = None  # of a packed batch: query tokens

    @classmethod
    def of_batch(cls, query: Tensor, key_tokens: int, geometry: Geometry) -> Sequences:
        """Sequences of a padded batch."""
        start, first, length = geometry.resolved(query.shape[0], query.shape[2], key_tokens, query.device)
        if geometry.key_start is not None:
            first = first.clamp(0, key_tokens)
            length = torch.minimum(length, key_tokens - first)
        elif geometry.key_length is not None:
            length = length.clamp(max=key_tokens)
        return cls(start.contiguous(), first.contiguous(), length.contiguous())

    @classmethod
    def of_packing(cls, packing: Packing, query_tokens: int, key_tokens: int) -> Sequences:
        """Sequences packed one behind the other."""
        packing = packing.inside(query_tokens, key_tokens)
        queries, keys = packing.query_bounds, packing.key_bounds
        count, length = queries.diff(), keys.diff()
        return cls(length - count, keys[:-1], length, queries[:-1], count)

    @classmethod
    def of_pages(cls, query: Tensor, pages: Pages, geometry: Geometry) -> Sequences:
        """Sequences of a cache: their queries are their last tokens unless the geometry says where they begin."""
        length = pages.length.clamp(max=pages.capacity)
        start = length - query.shape[2] if geometry.query_start is None else geometry.query_start.contiguous()
        return cls(start, torch.zeros_like(length), length)

    def query_blocks(self, tokens: int, group: int, size: int) -> tuple[int, dict[str, Tensor | None]]:
        """Blocks of `size` rows, `group` rows to a query token: their number and the arguments that name them."""
        if self.query_count is None:
            return -(-tokens * group // size), _UNPACKED
        return self._packed(self.query_count * group, tokens * group, size, last_first=True)

    def key_blocks(self, tokens: int, size: int) -> tuple[int, dict[str, Tensor | None]]:
        """The same for blocks of keys."""
        if self.query_count is None:
            return -(-tokens // size), _UNPACKED
        return self._packed(self.key_length, tokens, size, last_first=False)

    def _packed(self, counts: Tensor, total: int, size: int, last_first: bool) -> tuple[int, dict[str, Tensor | None]]:
        sequence, index = schedule(counts, total, size, last_first)
        blocks: dict[str, Tensor | None] = {"block_sequence": sequence, "block_index": index}
        return sequence.shape[0], blocks


_UNPACKED: dict[str, Tensor | None] = {"block_sequence": None, "block_index": None}


def schedule(counts: Tensor, total: int, size: int, last_first: bool) -> tuple[Tensor, Tensor]:
    """Deal blocks of `size` to sequences of int64[B] `counts`, at most one block a sequence more than `total` needs.

    Returns:
        The sequence of each block and its number there, int32; a block that no sequence needs has number -1. A grid
        of the longest sequence for every sequence, the usual way, would launch mostly empty programs.
    """
    blocks = (counts + size - 1) // size
    ends = blocks.cumsum(0)
    at = torch.arange(total // size + counts.shape[0], device=counts.device)
    sequence = torch.searchsorted(ends, at, right=True)
    used = sequence < counts.shape[0]
    sequence = sequence.clamp(max=counts.shape[0] - 1)
    index = at - (ends - blocks)[sequence]
    if last_first:
        index = blocks[sequence] - 1 - index
    return sequence.int(), torch.where(used, index, -1).int()


def tables(rotation: Rotation) -> dict[str, Tensor]:
    """Return the rotation's tables by parameter name."""
    return {
        name: getattr(rotation, name).contiguous()
        for name in ("turns", "base_turns", "start_tokens", "attention_factor", "regime_index")
    }


def head_constants(query: Tensor, rotation: Rotation) -> dict[str, Any]:
    """Return the compile-time constants that say how a head is cut into pieces."""
    head_dim, pairs = query.shape[-1], rotation.turns.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "PAIRS": pairs,
        "PAIR_BLOCK": pad(pairs),
        "REST_BLOCK": pad(head_dim - 2 * pairs),
    }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of a [B, H, T, D] operand, in elements."""
    return dict(zip((f"{name}_batch_stride", f"{name}_head_stride", f"{name}_token_stride"), x.stride(), strict=False))


def packed_view(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def unpacked(x: Tensor) -> Tensor:
    """[1, H, T, D] as [T, H, D]."""
    return x[0].transpose(0, 1)


def empty_like(x: Tensor, packed: bool) -> Tensor:
    """New memory for [B, H, T, D], contiguous; if packed, contiguous as [T, H, D]."""
    return packed_view(x.new_empty(unpacked(x).shape)) if packed else x.new_empty(x.shape)


def unit_last(positions: Tensor | None) -> Tensor | None:
    """Positions whose last stride is 1."""
    if positions is not None and positions.stride(-1) != 1:
        return positions.contiguous()
    return positions


def written(pages: Tensor) -> Tensor:
    """Return keys or values of a cache as the kernels that write them take them: fp8 as its bits."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def read(pages: Tensor, target: str) -> Tensor:
    """The same for the kernels that read them: fp8 as its bits where the target does not convert it."""
    return pages if has_fp8(target) else written(pages)


def cache_arguments(pages: Pages | None, config: Config) -> dict[str, Any]:
    """Return what says how a kernel reads keys from a cache, or that it does not."""
    if pages is None:
        names = ("table", "key_scale", "value_scale", "key_tail")
        return dict.fromkeys(names) | {"table_stride": 0, "page_tokens": 0, "ONE_PAGE": False}
    table = pages.block_table.contiguous()
    return {
        "table": table,
        "key_scale": pages.key_scale,
        "value_scale": pages.value_scale,
        "key_tail": pages.key_tail,
        "table_stride": table.stride(0),
        "page_tokens": pages.page_tokens,
        "room": pages.capacity,
        "ONE_PAGE": pages.page_tokens % config.keys == 0 or table.shape[1] == 1,
    }


def attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    sequences: Sequences,
    config: Config,
) -> dict[str, Any]:
    """Return what the kernels that walk keys for blocks of rows share."""
    query_heads, query_tokens = query.shape[1:3]
    key_heads = key.shape[1]
    query_positions, key_positions = unit_last(geometry.query_positions), unit_last(geometry.key_positions)
    right = 0 if geometry.is_causal else geometry.window_right
    return {
        "query": query,
        "key": key,
        "value": value,
        **tables(rotation),
        "query_positions": query_positions if query_positions is not None else sequences.query_start,
        "key_positions": key_positions if key_positions is not None else sequences.query_start,
        "query_start": sequences.query_start,
        "key_start": sequences.key_start,
        "key_length": sequences.key_length,
        "query_slot": sequences.query_slot,
        "query_count": sequences.query_count,
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        "query_positions_stride": query_positions.stride(0) if query_positions is not None else 0,
        "key_positions_stride": key_positions.stride(0) if key_positions is not None else 0,
        "key_heads": key_heads,
        "group": query_heads // key_heads,
        "query_tokens": query_tokens,
        "window_left": min(max(geometry.window_left, 0), _UNBOUNDED),
        "window_right": min(max(right, 0), _UNBOUNDED),
        **_score_scales(geometry),
        **head_constants(query, rotation),
        "VALUE_BLOCK": pad(query.shape[-1]),
        "INTERLEAVED": rotation.interleaved,
        "HAS_QUERY_POSITIONS": query_positions is not None,
        "HAS_KEY_POSITIONS": key_positions is not None,
        "HAS_LEFT": geometry.window_left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_CAP": geometry.softcap > 0.0,
        "BLOCK_ROWS": config.rows,
        "BLOCK_KEYS": config.keys,
    }


def _score_scales(geometry: Geometry) -> dict[str, float]:
    """Scores in units of log 2: s * scale_log2, or with a softcap tanh(s * cap_slope) * cap_log2."""
    cap = geometry.softcap
    return {
        "scale_log2": geometry.scale * _LOG2_E,
        "cap_slope": geometry.scale / cap if cap else 0.0,
        "cap_log2": cap * _LOG2_E,
    }
