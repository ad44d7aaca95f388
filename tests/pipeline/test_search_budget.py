"""The budget counts what the log says was spent, so that a resumed search spends the same."""

from __future__ import annotations

import pytest

from longrope.errors import BudgetExhausted
from longrope.search import Budget
from longrope.search.budget import forward_cost


def test_without_bounds_everything_is_affordable() -> None:
    budget = Budget()
    budget.spend(100, 1e9)
    assert budget.affords({100: 10**9})
    assert budget.done == 0.0


def test_evaluations_of_any_length_count_alike() -> None:
    budget = Budget(evaluations=5)
    budget.spend(100, 0.0)
    budget.spend(200, 0.0)
    assert budget.affords({100: 1, 200: 2})
    assert not budget.affords({100: 2, 200: 2})
    assert budget.done == pytest.approx(0.4)


def test_seconds_are_those_of_the_evaluations_and_the_next_ones_must_fit() -> None:
    budget = Budget(seconds=10.0)
    budget.spend(1000, 4.0)
    budget.spend(1000, 2.0)
    assert budget.spent_seconds == 6.0
    assert budget.affords({1000: 1})
    assert not budget.affords({1000: 2})
    with pytest.raises(BudgetExhausted):
        budget.require({1000: 2})


def test_a_length_that_was_not_measured_is_estimated_from_the_nearest() -> None:
    budget = Budget(seconds=10.0)
    budget.spend(1000, 1.0)
    budget.spend(8192, 5.0)
    assert budget.seconds_of(16384) == pytest.approx(5.0 * forward_cost(16384) / forward_cost(8192))
    assert budget.seconds_of(1000) == 1.0
    assert 2.0 < forward_cost(16384) / forward_cost(8192) < 4.0


def test_the_nearer_bound_says_how_much_is_done() -> None:
    budget = Budget(evaluations=10, seconds=10.0)
    budget.spend(100, 7.0)
    assert budget.done == pytest.approx(0.7)
    budget.spend(100, 7.0)
    assert budget.done == 1.0
