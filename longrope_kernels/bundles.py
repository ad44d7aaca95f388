"""Bundles of tensors that travel from the functional layer to a backend.

An op schema holds tensors and numbers only, so everything a kernel needs to know about a rotation and about the
place of the tokens in their sequences is one of these records, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def lse_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of `lse` for a query: float32, float64 for a float64 query."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rotation:
    """Tables of R rotary regimes over P = rotary_dim / 2 pairs, and the regime of each sequence of a batch of B.

    `turns` and `base_turns` are fractions of a turn per position in units of 2^-64 turn, wrapped to int64.
    """

    turns: Tensor  # int64[R, P]: rescaled frequencies, for positions >= start_tokens
    base_turns: Tensor  # int64[R, P]: original frequencies, for positions < start_tokens
    inv_freq: Tensor  # float64[R, P]: rescaled, radians per token; carries the gradient and is otherwise not read
    start_tokens: Tensor  # int64[R]: n-hat, in tokens
    attention_factor: Tensor  # float32[R]: multiplies cos and sin
    regime_index: Tensor  # int32[B]: row of the tables for each sequence
    interleaved: bool  # pairs are dims (2i, 2i+1) rather than (i, i + P)

    @property
    def rotary_dim(self) -> int:
        return 2 * self.turns.shape[-1]


@dataclass(frozen=True)
class Geometry:
    """Which keys each query sees, at which positions both are rotated, and how scores are formed.

    Sequence b is the key slots [key_start, key_start + key_length); the index of a token counts from key_start.
    """

    query_positions: Tensor | None  # int64[B, Tq]: rotation positions, or None: the index
    key_positions: Tensor | None  # int64[B, Tk]: rotation positions, or None: the index
    query_start: Tensor | None  # int64[B]: index of query row 0, or None: key_length - Tq (bottom-right alignment)
    key_start: Tensor | None  # int64[B]: first key slot, or None: 0
    key_length: Tensor | None  # int64[B]: keys in the sequence, or None: Tk - key_start
    scale: float
    is_causal: bool
    window_left: int  # keys visible before the query, -1: unbounded
    window_right: int  # keys visible after the query, -1: unbounded
    softcap: float  # 0.0: none

    def resolved(self, batch: int, query_tokens: int, key_tokens: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return (query_start, key_start, key_length), each int64[batch] on `device`, defaults filled in."""
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        key_start = zeros if self.key_start is None else self.key_start
        key_length = key_tokens - key_start if self.key_length is None else self.key_length
        query_start = key_length - query_tokens if self.query_start is None else self.query_start
        return query_start, key_start, key_length

    def visible(self, index: Tensor, key_length: Tensor) -> tuple[Tensor, Tensor]:
        """Return the half-open interval [low, high) of key indices that a query at `index` sees."""
        low = torch.zeros_like(index)
        high = torch.zeros_like(index) + key_length
        if self.window_left >= 0:
            low = torch.maximum(low, index - self.window_left)
        if self.is_causal:
            high = torch.minimum(high, index + 1)
        if self.window_right >= 0:
            high = torch.minimum(high, index + self.window_right + 1)
        return low, torch.maximum(high, low)


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie: sequence b is rows [bounds[b], bounds[b + 1])."""

    query_bounds: Tensor  # int64[B + 1], cumulative, from 0 to Tq
    key_bounds: Tensor  # int64[B + 1], cumulative, from 0 to Tk

    @property
    def batch(self) -> int:
        return self.query_bounds.shape[0] - 1

    def inside(self, query_tokens: int, key_tokens: int) -> Packing:
        """Bounds that never fall and end with operands of so many tokens: those on a device nobody checked."""
        bounds = ((self.query_bounds, query_tokens), (self.key_bounds, key_tokens))
        return Packing(*(x.clamp(0, tokens).cummax(0).values for x, tokens in bounds))


KEY_GROUP = 64  # keys that share one scale per channel in a quantised cache, by index in the sequence
# The formats of a quantised cache, by the dtype of its pages, and what a scale maps the largest magnitude to.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Pages:
    """A cache of unrotated keys and values: key i of sequence b is slot i % page_tokens of page
    block_table[b, i // page_tokens].

    Quantised where the scales are given, to int8 or fp8 (e4m3): values with a scale per token; keys with a scale per
    channel for every whole group of KEY_GROUP tokens, and in full precision in the tail until their group is whole. The
    tail is a ring, so the length of a quantised sequence can be taken back within its last group only
    (`KVCache.truncate`).
    """

    key: Tensor  # [pages, Hkv, page_tokens, D], in the dtype of the query, int8 or float8_e4m3fn
    value: Tensor  # like key
    block_table: Tensor  # int32[B, N], pages of each sequence in order; entries past its length are not read
    length: Tensor  # int64[B], tokens in the cache
    key_scale: Tensor | None = None  # float32[pages, Hkv, page_tokens / KEY_GROUP, D], contiguous
    value_scale: Tensor | None = None  # float32[pages, Hkv, page_tokens], contiguous
    key_tail: Tensor | None = None  # [B, Hkv, KEY_GROUP, D], in the dtype of the query

    @property
    def page_tokens(self) -> int:
        return self.key.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's row of the block table has room for."""
        return self.block_table.shape[1] * self.page_tokens

    @property
    def quantised(self) -> bool:
        return self.key_scale is not None
