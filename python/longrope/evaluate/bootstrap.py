"""Intervals of the difference of two methods on the same tokens.

Losses of neighbouring tokens depend on each other, so whole blocks of them are resampled, and both methods are always
resampled together: what a text is like cancels, what the methods differ in remains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .scoring import blocks

RESAMPLES = 10_000
BLOCK_TOKENS = 256


@dataclass(frozen=True)
class PairedDifference:
    """Mean loss of one method minus that of another, in nats per token, with a percentile interval.

    Attributes:
        low, high: ends of the 95% interval.
        perplexity_ratio: exp(mean): 0.9 is a tenth less.
    """

    mean: float
    low: float
    high: float
    blocks: int
    block_tokens: int
    documents: int

    @property
    def perplexity_ratio(self) -> float:
        return math.exp(self.mean)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


def paired_difference(
    one: Sequence[dict[str, Any]],
    other: Sequence[dict[str, Any]],
    first: int,
    last: int,
    block_tokens: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap the mean loss of `one` minus that of `other` over positions [first, last).

    Args:
        one, other: records of the same windows, in the same order.
        block_tokens: contiguous tokens that are resampled as one, 256 where that leaves 16 blocks of a document;
            documents keep their number of blocks.
    """
    if block_tokens is None:
        block_tokens = min(BLOCK_TOKENS, (last - first) // 16)
    random = np.random.default_rng(seed)
    totals, tokens = np.zeros(resamples), np.zeros(resamples)
    mean_total, mean_tokens, count = 0.0, 0, 0
    size = block_tokens
    for a, b in zip(one, other, strict=True):
        if a["window"] != b["window"]:
            raise ValueError(f"records: got {a['window']} beside {b['window']}, expected the same window")
        coarse = max(a["block_tokens"], b["block_tokens"])  # a multiple of the other: both divide 64
        size = coarse * max(block_tokens // coarse, 1)
        (left, number), (right, _) = (merged(record, first, last, size) for record in (a, b))
        difference = left - right
        drawn = random.multinomial(len(number), np.full(len(number), 1 / len(number)), size=resamples)
        totals += drawn @ difference
        tokens += drawn @ number
        mean_total += float(difference.sum())
        mean_tokens += int(number.sum())
        count += len(number)
    low, high = np.quantile(totals / tokens, (0.025, 0.975))
    return PairedDifference(mean_total / mean_tokens, float(low), float(high), count, size, len(one))


def merged(record: dict[str, Any], first: int, last: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of the losses and numbers of tokens over positions [first, last), `size` at a time."""
    sums, counts = blocks(record, first, last)
    edges = np.arange(0, len(counts), size // record["block_tokens"])
    return np.add.reduceat(sums, edges), np.add.reduceat(counts, edges)
