"""Paired bootstrap intervals: they cover, they are paired, they know nothing of what the methods share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from longrope.evaluate import paired_difference

BLOCK, LENGTH = 16, 4096


def record(losses: np.ndarray, window: str = "a", start: int = 0, block: int = BLOCK) -> dict[str, Any]:
    """Return the record of a window whose token losses, from position max(start, 1), are `losses`."""
    sums = np.add.reduceat(losses, np.r_[0, np.arange(block - max(start, 1) % block, len(losses), block)])
    return {
        "window": window,
        "block_tokens": block,
        "start": start,
        "length": max(start, 1) + len(losses),
        "block_nll": sums.tolist(),
    }


def correlated(random: np.random.Generator, tokens: int, memory: float = 0.8) -> np.ndarray:
    """Noise of unit variance in which neighbours resemble each other."""
    drawn = random.normal(size=tokens) * (1 - memory**2) ** 0.5
    drawn[0] /= (1 - memory**2) ** 0.5
    for token in range(1, tokens):
        drawn[token] += memory * drawn[token - 1]
    return drawn


def test_a_95_percent_interval_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    truth, covered = -0.03, 0
    trials = 150
    for _ in range(trials):
        text = 3 + 2 * random.normal(size=(2, LENGTH - 1))
        one = [record(text[i] + truth + 0.5 * correlated(random, LENGTH - 1), str(i)) for i in range(2)]
        other = [record(text[i], str(i)) for i in range(2)]
        found = paired_difference(one, other, 0, LENGTH, resamples=400)
        covered += found.low <= truth <= found.high
    assert 0.88 * trials <= covered <= 0.995 * trials


def test_what_both_methods_share_cancels() -> None:
    random = np.random.default_rng(1)
    noise, text = 0.1 * random.normal(size=LENGTH - 1), 50 * correlated(random, LENGTH - 1)
    zero = np.zeros(LENGTH - 1)
    quiet = paired_difference([record(noise)], [record(zero)], 0, LENGTH)
    loud = paired_difference([record(noise + text)], [record(text)], 0, LENGTH)
    assert (loud.mean, loud.low, loud.high) == pytest.approx((quiet.mean, quiet.low, quiet.high), abs=1e-9)
    assert loud.high - loud.low < 0.02


def test_the_mean_is_that_of_the_tokens_asked_for() -> None:
    random = np.random.default_rng(2)
    one, other = random.normal(size=(2, LENGTH - 1))
    found = paired_difference([record(one)], [record(other)], 1024, 2048)
    assert found.mean == pytest.approx((one - other)[1023:2047].mean(), abs=1e-12)
    assert found.low < found.mean < found.high
    assert found.perplexity_ratio == pytest.approx(np.exp(found.mean))


def test_longer_blocks_widen_the_interval_of_correlated_losses() -> None:
    random = np.random.default_rng(3)
    one, zero = record(correlated(random, LENGTH - 1, 0.95)), record(np.zeros(LENGTH - 1))
    short, long = (paired_difference([one], [zero], 0, LENGTH, block_tokens=size) for size in (16, 256))
    assert long.high - long.low > 1.5 * (short.high - short.low)
    assert (short.block_tokens, short.blocks) == (16, 256)
    assert (long.block_tokens, long.blocks) == (256, 16)


def test_records_of_unequal_blocks_are_compared_by_the_coarser() -> None:
    one, other = np.random.default_rng(7).normal(size=(2, LENGTH - 1))
    same = paired_difference([record(one)], [record(other)], 1024, 4096)
    for left, right in ((64, BLOCK), (BLOCK, 64)):
        found = paired_difference([record(one, block=left)], [record(other, block=right)], 1024, 4096)
        assert found.to_dict() == pytest.approx(same.to_dict(), abs=1e-12)
    narrow = paired_difference([record(one, block=64)], [record(other)], 1024, 4096, block_tokens=48)
    assert narrow.block_tokens == 64
    assert narrow.mean == pytest.approx(same.mean, abs=1e-12)


def test_a_method_beside_itself_differs_by_nothing() -> None:
    one = record(np.random.default_rng(4).normal(size=LENGTH - 1))
    found = paired_difference([one], [one], 0, LENGTH)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    one, other = (record(np.random.default_rng(seed).normal(size=LENGTH - 1)) for seed in (5, 6))
    assert paired_difference([one], [other], 0, LENGTH) == paired_difference([one], [other], 0, LENGTH)


def test_records_of_other_windows_are_not_compared() -> None:
    one, other = (record(np.zeros(LENGTH - 1), window) for window in "ab")
    with pytest.raises(ValueError, match="got a beside b"):
        paired_difference([one], [other], 0, LENGTH)
