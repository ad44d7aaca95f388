"""Intervals: of a mean loss, of the difference of two methods on the same tokens, of a share of questions answered.

Losses of neighbouring tokens depend on each other, so whole blocks of them are resampled, within their document. Two
methods are always resampled together: what a text is like cancels, what the methods differ in remains.
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
NORMAL_95 = 1.959963984540054  # the two-sided 95% point of the normal distribution


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
    groups = []
    size = block_tokens
    for a, b in zip(one, other, strict=True):
        if a["window"] != b["window"]:
            raise ValueError(f"records: got {a['window']} beside {b['window']}, expected the same window")
        coarse = max(a["block_tokens"], b["block_tokens"])  # a multiple of the other: both divide 64
        size = coarse * max(block_tokens // coarse, 1)
        (left, number), (right, _) = (merged(record, first, last, size) for record in (a, b))
        groups.append((left - right, number))
    count = sum(len(number) for _, number in groups)
    return PairedDifference(*_bootstrap(groups, resamples, seed), count, size, len(one))


def merged(record: dict[str, Any], first: int, last: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of the losses and numbers of tokens over positions [first, last), `size` at a time."""
    sums, counts = blocks(record, first, last)
    edges = np.arange(0, len(counts), size // record["block_tokens"])
    return np.add.reduceat(sums, edges), np.add.reduceat(counts, edges)


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95% interval; None where there is too little to tell."""

    value: float
    low: float | None
    high: float | None


def mean_interval(
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    block: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap a mean: the total of `sums` over the total of `counts`.

    Args:
        groups: sums and counts of neighbouring stretches, float64[stretches] each, for each document. Blocks are
            resampled within a document, and its number of blocks is kept.
        block: tokens that are resampled as one, at least; None: 256, or what leaves 16 blocks of the first document.

    Returns:
        An interval without ends where there are fewer than two blocks. One of equal values is zero wide.
    """
    if block is None:
        block = min(BLOCK_TOKENS, max(int(groups[0][1].sum()) // 16, 1))
    coarse = []
    for sums, counts in groups:
        # A stretch belongs to the block in which it begins.
        _, index = np.unique((np.cumsum(counts) - counts) // block, return_inverse=True)
        coarse.append((np.bincount(index, sums), np.bincount(index, counts)))
    mean, low, high = _bootstrap(coarse, resamples, seed)
    alone = sum(len(sums) for sums, _ in coarse) < 2
    return Interval(mean, None if alone else low, None if alone else high)


def _bootstrap(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return the total of sums over that of counts, and its 95% percentile interval, blocks drawn within each group."""
    random = np.random.default_rng(seed)
    totals, tokens = np.zeros(resamples), np.zeros(resamples)
    for sums, counts in groups:
        drawn = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
        totals += drawn @ sums
        tokens += drawn @ counts
    mean = sum(float(sums.sum()) for sums, _ in groups) / sum(float(counts.sum()) for _, counts in groups)
    low, high = np.quantile(totals / tokens, (0.025, 0.975))
    return mean, float(low), float(high)


def wilson(successes: int, trials: int) -> Interval:
    """Return the share of successes with Wilson's interval of a binomial (1927), which serves at 0 and 1 as well.

    Examples:
        >>> one = wilson(10, 10)
        >>> one.value, round(one.low, 3), round(one.high, 3)
        (1.0, 0.722, 1.0)
    """
    z2 = NORMAL_95**2
    share = successes / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(share, max(middle - half, 0.0), min(middle + half, 1.0))
