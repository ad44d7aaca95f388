"""The space of the search: bounds, grid, and the monotone rule by pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import UsageError
from longrope.search import Candidate, Space
from longrope.search.space import nearest_monotone
from longrope_kernels import RopeScaling

logs = st.lists(st.floats(-3, 3), min_size=1, max_size=24)


def space_for(values: list[float], **changes: object) -> Space:
    return Space(len(values), 4.0, **changes)  # type: ignore[arg-type]


@given(logs)
def test_legal_factors_are_in_bounds_on_the_grid_and_never_decrease(values: list[float]) -> None:
    factors = np.asarray(space_for(values).legal(values).factors)
    assert factors.min() >= 1.0
    assert factors.max() <= 5.0
    assert np.all(np.diff(factors) >= 0)
    assert np.allclose(np.rint((factors - 1.0) / 0.01), (factors - 1.0) / 0.01, atol=1e-6)


@given(logs, st.booleans())
def test_a_legal_point_stays_what_it_is(values: list[float], monotone: bool) -> None:
    space = space_for(values, monotone=monotone)
    once = space.legal(values, 16)
    assert space.legal(once.logs, once.start_tokens, once.attention_factor) == once


@given(logs)
def test_without_the_monotone_rule_each_factor_is_the_nearest_of_the_grid(values: list[float]) -> None:
    factors = space_for(values, monotone=False).legal(values).factors
    for value, factor in zip(np.exp(values), factors, strict=True):
        assert abs(factor - min(max(value, 1.0), 5.0)) <= 0.005 + 1e-9


@given(logs, st.integers(0, 2**32 - 1))
def test_pooling_gives_the_nearest_monotone_sequence(values: list[float], seed: int) -> None:
    array = np.asarray(values)
    pooled = nearest_monotone(array)
    assert np.all(np.diff(pooled) >= 0)
    distance = ((pooled - array) ** 2).sum()
    random = np.random.default_rng(seed)
    for size in (0.01, 0.3):
        others = np.sort(pooled + random.normal(0, size, (20, len(array))), axis=1)
        assert (((others - array) ** 2).sum(1) >= distance - 1e-9).all()


@given(logs)
def test_pooling_leaves_a_monotone_sequence_alone_and_keeps_the_mean(values: list[float]) -> None:
    array = np.asarray(values)
    assert np.array_equal(nearest_monotone(np.sort(array)), np.sort(array))
    assert nearest_monotone(array).mean() == pytest.approx(array.mean(), abs=1e-9)


def test_a_last_grid_point_beyond_the_upper_bound_is_not_used() -> None:
    assert Space(1, 4.0, upper=1.025).legal([1.0]).factors == (1.02,)


def test_n_hat_and_attention_factor_become_the_nearest_choices() -> None:
    space = Space(1, 4.0, start_tokens=(0, 16, 64), attention_factors=(1.0, 1.1))
    made = space.legal([0.0], 50, 1.06)
    assert (made.start_tokens, made.attention_factor) == (64, 1.1)


def test_a_candidate_multiplies_the_factors_the_model_was_trained_with() -> None:
    base = RopeScaling(head_dim=4, theta=1e4, rescale_factors=[1.0, 8.0], attention_factor=1.2)
    scaling = Candidate((1.5, 2.0), 16, 1.1).scaling(base)
    assert scaling.rescale_factors == (1.5, 16.0)
    assert scaling.attention_factor == pytest.approx(1.32)
    assert scaling.start_tokens == 16


def test_a_candidate_survives_json() -> None:
    candidate = Candidate((1.01, 2.34), 8, 1.05)
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    assert Candidate.from_dict(candidate.to_dict()).id == candidate.id


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pairs": 0}, "pairs: got 0"),
        ({"extension": 1.0}, "--to: got 1 times the original length"),
        ({"extension": math.inf}, "--to: got inf"),
        ({"start_tokens": ()}, "--start-tokens: got ()"),
        ({"start_tokens": (0, -1)}, "--start-tokens: got (0, -1)"),
        ({"attention_factors": (math.nan,)}, "--attention-factor: got (nan,)"),
        ({"attention_factors": ()}, "--attention-factor: got ()"),
        ({"step": 0.0}, "step: got 0.0"),
        ({"lower": 6.0}, "lower: got 6.0"),
    ],
)
def test_a_space_that_is_none_is_refused_by_name(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match="expected") as refused:
        Space(**{"pairs": 8, "extension": 4.0, **arguments})  # type: ignore[arg-type]
    assert str(refused.value).startswith(named)
