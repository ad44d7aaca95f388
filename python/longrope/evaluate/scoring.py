"""One evaluation: one forward of one window under one rotary embedding, logged for good."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

import longrope_kernels as lk

from ..data import Window
from ..loss import token_nll
from ..models import LoadedModel
from ..run import EvaluationLog, digest, now
from ..team import Forward, Leader

BLOCK_TOKENS = 64


def bucket_tokens(original_length: int) -> int:
    """Return the width of the position buckets: a quarter of the original length, 2,048 for 8,192."""
    return max(original_length // 4, 1)


def block_tokens(original_length: int) -> int:
    """Return how many positions one sum of the log covers: 64, or what divides a bucket."""
    return math.gcd(BLOCK_TOKENS, bucket_tokens(original_length))


def run_forward(loaded: LoadedModel, forward: Forward) -> dict[str, Any]:
    """Run one forward and return its record, without the fields that name the window and its purpose."""
    loaded.use(forward.rope)
    began = time.monotonic()
    device = next(loaded.model.parameters()).device
    ids = torch.tensor(forward.window.tokens[: forward.length], device=device)
    nll = token_nll(loaded.model, ids, forward.start).cpu().numpy()
    seconds = time.monotonic() - began
    size = block_tokens(loaded.original_length)
    return {
        "length": forward.length,
        "start": forward.start,
        "nll": float(nll.astype(np.float64).mean()),
        "block_tokens": size,
        "block_nll": [round(value, 6) for value in block_sums(nll, max(forward.start, 1), size)],
        "nll_sha256": hashlib.sha256(nll.tobytes()).hexdigest(),
        "seconds": round(seconds, 3),
        "time": now(),
    }


class Scorer:
    """Scores windows, at most once each: what the log has is not computed again.

    A record holds sums of the negative log-likelihood over blocks of `block_tokens` positions, aligned to position 0,
    from which every perplexity, curve and interval of the report is made.

    Args:
        on_new: called with the length and the seconds after each forward.
        on_known: called with the length of each evaluation that the log already had.
        team: the other ranks, who compute what is announced; None: this process computes all.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        log: EvaluationLog,
        on_new: Callable[[int, float], None] = lambda length, seconds: None,
        on_known: Callable[[int], None] = lambda length: None,
        team: Leader | None = None,
    ) -> None:
        self.loaded, self.log, self.team = loaded, log, team
        self.block_tokens = block_tokens(loaded.original_length)
        self.on_new, self.on_known = on_new, on_known
        self._announced: set[str] = set()

    def announce(self, forwards: Iterable[Forward]) -> None:
        """Say what will be scored next, in this order, so that other ranks can begin with it; nothing without them."""
        if self.team is not None:
            new = {key: forward for key, forward in map(_keyed, forwards) if self.log.get(key) is None}
            self._announced.update(new)
            self.team.announce(new.items())

    def score(
        self, window: Window, rope: lk.LongRope, length: int | None = None, start: int = 0, **about: Any
    ) -> dict[str, Any]:
        """Return the record of the first `length` tokens of `window`, of which those from index `start` on are scored.

        Args:
            rope: the ladder, whose regime for `length` tokens is used.
            start: a multiple of `block_tokens`; 0 scores all tokens but the first.
            about: further fields for the log, such as the stage and the candidate.
        """
        forward = Forward(window, rope, len(window.tokens) if length is None else length, start, about)
        key, _ = _keyed(forward)
        known = self.log.get(key)
        if known is not None and key not in self._announced:
            self.on_known(forward.length)
            return known
        if known is None:
            take = self._run if self.team is None else functools.partial(self.team.take, run=self._run)
            take(key, forward)
        self._announced.discard(key)
        record = self.log.records[key]
        self.on_new(forward.length, record["seconds"])
        return record

    def known(self, window: Window, rope: lk.LongRope, length: int, start: int = 0) -> dict[str, Any] | None:
        """Return the record that `score` would, where the log has it."""
        return self.log.get(_keyed(Forward(window, rope, length, start))[0])

    def _run(self, key: str, forward: Forward) -> None:
        record = run_forward(self.loaded, forward)
        self.log.append_once(key, {**forward.about, "window": forward.window.name, **record})


def _keyed(forward: Forward) -> tuple[str, Forward]:
    """Return a forward with its key in the log."""
    what = {"window": forward.window.describe(), "rope": forward.rope.to_dict()}
    return digest({**what, "length": forward.length, "start": forward.start}), forward


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
