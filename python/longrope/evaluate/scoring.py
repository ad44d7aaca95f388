"""One evaluation: one forward of one window under one rotary embedding, logged for good."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import longrope_kernels as lk

from ..data import Window
from ..loss import token_nll
from ..models import LoadedModel
from ..run import EvaluationLog, digest, now

BLOCK_TOKENS = 64


def bucket_tokens(original_length: int) -> int:
    """Return the width of the position buckets: a quarter of the original length, 2,048 for 8,192."""
    return max(original_length // 4, 1)


def block_tokens(original_length: int) -> int:
    """Return how many positions one sum of the log covers: 64, or what divides a bucket."""
    return math.gcd(BLOCK_TOKENS, bucket_tokens(original_length))


class Scorer:
    """Scores windows, at most once each: what the log has is not computed again.

    A record holds sums of the negative log-likelihood over blocks of `block_tokens` positions, aligned to position 0,
    from which every perplexity, curve and interval of the report is made.

    Args:
        on_new: called with the length and the seconds after each forward.
        on_known: called with the length of each evaluation that the log already had.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        log: EvaluationLog,
        on_new: Callable[[int, float], None] = lambda length, seconds: None,
        on_known: Callable[[int], None] = lambda length: None,
    ) -> None:
        self.loaded, self.log = loaded, log
        self.block_tokens = block_tokens(loaded.original_length)
        self.on_new, self.on_known = on_new, on_known

    def score(
        self, window: Window, rope: lk.LongRope, length: int | None = None, start: int = 0, **about: Any
    ) -> dict[str, Any]:
        """Return the record of the first `length` tokens of `window`, of which those from index `start` on are scored.

        Args:
            rope: the ladder, whose regime for `length` tokens is used.
            start: a multiple of `block_tokens`; 0 scores all tokens but the first.
            about: further fields for the log, such as the stage and the candidate.
        """
        length = len(window.tokens) if length is None else length
        what = {"window": window.describe(), "rope": rope.to_dict(), "length": length, "start": start}
        key = digest(what)
        known = self.log.get(key)
        if known is not None:
            self.on_known(length)
            return known
        self.loaded.use(rope)
        began = time.monotonic()
        device = next(self.loaded.model.parameters()).device
        ids = torch.tensor(window.tokens[:length], device=device)
        nll = token_nll(self.loaded.model, ids, start).cpu().numpy()
        seconds = time.monotonic() - began
        sums = block_sums(nll, max(start, 1), self.block_tokens)
        record = self.log.append(
            key,
            {
                **about,
                "window": window.name,
                "length": length,
                "start": start,
                "nll": float(nll.astype(np.float64).mean()),
                "block_tokens": self.block_tokens,
                "block_nll": [round(value, 6) for value in sums],
                "nll_sha256": hashlib.sha256(nll.tobytes()).hexdigest(),
                "seconds": round(seconds, 3),
                "time": now(),
            },
        )
        self.on_new(length, seconds)
        return record


def block_sums(nll: np.ndarray, first: int, block_tokens: int) -> list[float]:
    """Sum the losses of tokens `first`, `first + 1`, ... over blocks of positions aligned to position 0."""
    positions = first + np.arange(len(nll))
    index = positions // block_tokens
    return np.bincount(index - index[0], nll.astype(np.float64)).tolist() if len(nll) else []


def mean_nll(records: Sequence[dict[str, Any]], first: int, last: int) -> float:
    """Return the mean loss over positions [first, last) of all records; both are block boundaries."""
    total, tokens = 0.0, 0
    for record in records:
        sums, counts = blocks(record, first, last)
        total, tokens = total + float(sums.sum()), tokens + int(counts.sum())
    return total / tokens if tokens else math.nan


def blocks(record: dict[str, Any], first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums and the numbers of tokens of the blocks that cover positions [first, last)."""
    size, start, length = record["block_tokens"], record["start"], record["length"]
    edges = np.arange(start // size, -(-length // size) + 1) * size
    low = np.maximum(edges[:-1], max(start, 1))
    high = np.minimum(edges[1:], length)
    inside = (edges[:-1] >= first) & (edges[:-1] < last)
    return np.asarray(record["block_nll"])[inside], (high - low)[inside]
