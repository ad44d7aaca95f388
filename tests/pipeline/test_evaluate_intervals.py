"""Intervals: Wilson's against its published values, the bootstrap against what it must do on known numbers."""

from __future__ import annotations

import numpy as np
import pytest

from longrope.evaluate.bootstrap import mean_interval, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, table I, method 3 (score without continuity correction); the third by symmetry.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (20, 20, 0.8389, 1.0),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.value == successes / trials


def test_the_mean_weighs_every_token_alike() -> None:
    groups = [(np.array([2.0, 6.0]), np.array([1.0, 3.0])), (np.array([12.0]), np.array([4.0]))]
    assert mean_interval(groups, 1).value == pytest.approx(20 / 8)


def test_the_interval_of_independent_blocks_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = mean_interval([(values, np.ones(400))], 1)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_neighbours_that_move_together_make_it_wider() -> None:
    values = np.repeat(np.random.default_rng(0).normal(5.0, 2.0, 40), 16)
    alone, together = (mean_interval([(values, np.ones(640))], block) for block in (1, 16))
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_documents_are_not_traded_for_each_other() -> None:
    groups = [(np.full(20, level), np.ones(20)) for level in (1.0, 9.0)]
    found = mean_interval(groups, 1)
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)


def test_too_little_has_no_interval() -> None:
    found = mean_interval([(np.array([3.0]), np.array([1.0]))], 1)
    assert (found.value, found.low, found.high) == (3.0, None, None)
