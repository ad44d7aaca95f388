"""A cache of unrotated keys and their values: contiguous or in pages, in the model's dtype, int8 or fp8.

Keys are rotated where they are read, so a change of regime in the middle of a sequence leaves no stale phases, and the
same cache serves any rotary embedding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import checks, ops_packed
from .backends import cpu
from .bundles import KEY_GROUP, Pages
from .errors import brief, refuse
from .functional import append_counts, attention_paged, page_fields
from .rope import LongRope, RopeScaling


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, in huge pages where the system has them: they are asked for before the memory is written."""
    x = torch.empty(shape, dtype=dtype, device=device)
    cpu.advise_huge_pages(x)
    return x.zero_()


class KVCache:
    """Keys and values of a batch of sequences, each of its own length.

    Args:
        batch: sequences.
        key_heads, head_dim: of keys and values.
        max_tokens: that a sequence can hold.
        dtype: of the queries, keys and values that come in.
        quantised: "int8" (or True), "fp8" (e4m3) or False. Values have a scale per token, keys a scale per channel for
            every 64 tokens (half the error of a scale per token on unrotated keys); the last keys stay in `dtype` until
            their 64 are whole. Both take half the memory of 16 bits; of the two int8 errs least
            (`bench/quantised_cache.py`).
        page_tokens: tokens of a page; None: one run of memory per sequence. A multiple of 64 where quantised.
        pages: pages of the pool all sequences share; None: enough for every sequence at `max_tokens`.
        device: where the memory lies.

    Examples:
        >>> cache = KVCache(batch=1, key_heads=2, head_dim=64, max_tokens=256)
        >>> scaling = RopeScaling(head_dim=64, theta=1e4)
        >>> q, k, v = (torch.randn(1, heads, 5, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
        >>> cache.append(k, v)
        >>> cache.attend(q, scaling).shape
        torch.Size([1, 8, 5, 64])
    """

    def __init__(
        self,
        batch: int,
        key_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        quantised: bool | str = False,
        page_tokens: int | None = None,
        pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.integer("batch", batch, 1)
        checks.integer("key_heads", key_heads, 1)
        checks.integer("head_dim", head_dim, 1, checks.MAX_HEAD_DIM)
        checks.integer("max_tokens", max_tokens, 1)
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            refuse("dtype", dtype, "float32, float16 or bfloat16 (int8 and fp8: quantised=True or 'fp8')", TypeError)
        stored = _stored(quantised)
        self.paged = page_tokens is not None
        if page_tokens is None:
            page_tokens = max_tokens if stored is None else -(-max_tokens // KEY_GROUP) * KEY_GROUP
            if pages is not None:
                refuse("pages", pages, "None without page_tokens")
        checks.integer("page_tokens", page_tokens, 1)
        if stored is not None and page_tokens % KEY_GROUP:
            refuse("page_tokens", page_tokens, f"a multiple of {KEY_GROUP}")
        per_sequence = -(-max_tokens // page_tokens)
        pages = batch * per_sequence if pages is None else checks.integer("pages", pages, 1)
        shape = (pages, key_heads, page_tokens, head_dim)
        table = torch.full((batch, per_sequence), -1, dtype=torch.int32, device=device)
        if not self.paged:
            table[:] = torch.arange(batch, device=device).unsqueeze(1)
        self.pages = Pages(
            _zeros(shape, stored or dtype, device),
            _zeros(shape, stored or dtype, device),
            table,
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(pages, key_heads, page_tokens // KEY_GROUP, head_dim, device=device) if stored else None,
            torch.zeros(pages, key_heads, page_tokens, device=device) if stored else None,
            torch.zeros(batch, key_heads, KEY_GROUP, head_dim, dtype=dtype, device=device) if stored else None,
        )
        self.max_tokens = max_tokens
        self.free = list(range(pages - 1, -1, -1)) if self.paged else []  # the lowest free page is taken first
        self._held = [0] * batch  # tokens of each sequence, known without reading the device
        self._owned: list[list[int]] = [[] for _ in range(batch)]  # pages of each sequence, in order

    @property
    def length(self) -> Tensor:
        """Tokens of each sequence, int64[batch]."""
        return self.pages.length

    @property
    def bytes(self) -> int:
        """Memory of keys, values, scales, tail and block table."""
        fields = (getattr(self.pages, field.name) for field in dataclasses.fields(self.pages))
        return sum(x.numel() * x.element_size() for x in fields if x is not None)

    def append(self, key: Tensor, value: Tensor, count: Tensor | None = None, backend: str | None = None) -> None:
        """Add the tokens of every sequence.

        Args:
            key, value: [batch, key_heads, tokens, head_dim]; keys unrotated.
            count: int[batch], how many of the tokens to take, from the first; None: all.
            backend: "cpu", "triton", "cuda", "reference", or None for the fastest that can.

        Raises:
            ValueError: more than `max_tokens`, or no page left; one line, and the cache is as before.
        """
        each = append_counts(key, value, self.pages, count)
        counts = [key.shape[2]] * len(self._held) if count is None else count.tolist()
        for b, (held, more) in enumerate(zip(self._held, counts, strict=True)):
            if held + more > self.max_tokens:
                refuse("key", f"{more} tokens for sequence {b}, which has {held}", f"at most {self.max_tokens} in all")
        taken = self._reserve(counts) if self.paged else []
        try:
            ops_packed.cache_append(key, value, *page_fields(self.pages), each, checks.backend(backend))
        except Exception:
            for b in reversed(taken):  # the pages taken for this call go back
                self.free.append(self._owned[b].pop())
                self.pages.block_table[b, len(self._owned[b])] = -1
            raise
        self._held = [held + more for held, more in zip(self._held, counts, strict=True)]
        self.pages.length.copy_(torch.tensor(self._held, device="cpu"))

    def attend(
        self,
        query: Tensor,
        scaling: RopeScaling | LongRope | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        window: int | tuple[int, int] | None = None,
        softcap: float | None = None,
        query_positions: Tensor | None = None,
        query_start: Tensor | None = None,
        regime_index: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend with the last tokens of each sequence, [batch, query_heads, query_tokens, head_dim], already appended.

        Arguments and results are those of `attention_paged`.
        """
        return attention_paged(
            query,
            self.pages,
            scaling,
            is_causal,
            scale,
            window,
            softcap,
            query_positions,
            query_start,
            regime_index,
            return_lse,
            backend,
        )

    def truncate(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` of one sequence, as when drafted tokens are refused.

        Raises:
            ValueError: more than it has; or, of a quantised cache, fewer than its last whole 64: what was rounded has
                no full-precision tail to go back to (0 empties it all the same).
        """
        checks.integer("sequence", sequence, 0, len(self._held) - 1)
        held = self._held[sequence]
        least = held // KEY_GROUP * KEY_GROUP if self.pages.key_tail is not None else 0
        if not checks.is_int(tokens) or (tokens != 0 and not least <= tokens <= held):
            refuse("tokens", tokens, f"0, or from {least} to the {held} tokens of sequence {sequence}")
        self._held[sequence] = tokens
        self.pages.length[sequence] = tokens
        if self.paged:
            kept = -(-tokens // self.pages.page_tokens)
            self.free.extend(reversed(self._owned[sequence][kept:]))
            del self._owned[sequence][kept:]
            self.pages.block_table[sequence, kept:] = -1

    def release(self, sequence: int) -> None:
        """Empty one sequence; its pages go back to the pool."""
        self.truncate(sequence, 0)

    def _reserve(self, counts: list[int]) -> list[int]:
        """Give every sequence the pages it needs; return which sequence got each."""
        page_tokens = self.pages.page_tokens
        needs = [
            b
            for b, (held, more, owned) in enumerate(zip(self._held, counts, self._owned, strict=True))
            for _ in range(-(-(held + more) // page_tokens) - len(owned))
        ]
        if len(needs) > len(self.free):
            refuse("key", f"{len(needs)} more pages needed", f"at most the {len(self.free)} that are free")
        for b in needs:
            page = self.free.pop()
            self.pages.block_table[b, len(self._owned[b])] = page
            self._owned[b].append(page)
        return needs


def _stored(quantised: bool | str) -> torch.dtype | None:
    """Return the dtype of the pages of a quantised cache, or None for those of one that is not."""
    formats: dict[bool | str, torch.dtype | None] = {
        "int8": torch.int8,
        "fp8": torch.float8_e4m3fn,
        True: torch.int8,
        False: None,
    }
    if not isinstance(quantised, (bool, str)) or quantised not in formats:
        refuse("quantised", brief(quantised), "'int8' (or True), 'fp8' or False")
    return formats[quantised]
