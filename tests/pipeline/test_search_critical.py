"""LongRoPE2's space: NTK below the critical pair, factors in [s, 2s] from it on, and the critical pair is searched."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from landscape import EXTENSION, PAIRS, Landscape, critical_seeds_too, critical_space, seeds

from longrope.errors import UsageError
from longrope.search import Candidate, EvolutionSettings, Outcome, evolve
from longrope.search.seeds import CRITICAL_SEEDS, SEEDS
from longrope.search.spaces import CriticalSpace, critical_choices, ntk_below
from longrope.search.variation import crossover, mutate
from longrope_kernels import RopeScaling

SETTINGS = EvolutionSettings(population=24, iterations=25, mutations=12, crossovers=12, parents=12)
REAL = 15
logs = st.lists(st.floats(-3, 3), min_size=PAIRS, max_size=PAIRS)


def best() -> np.ndarray:
    """Factors as LongRoPE2 finds them: the critical pair below the theoretical one, more than s above it."""
    factors = ntk_below(EXTENSION, REAL, PAIRS)
    factors[REAL:] = np.linspace(1.05, 1.7, PAIRS - REAL) * EXTENSION
    return factors


def is_of_the_space(candidate: Candidate) -> bool:
    critical = candidate.critical_pair
    assert critical is not None
    factors = np.asarray(candidate.factors)
    free = factors[critical:]
    steps = (free - EXTENSION) / 0.01
    return (
        critical in critical_space().critical
        and np.allclose(factors[:critical], ntk_below(EXTENSION, critical, PAIRS)[:critical])
        and bool(np.all((free >= EXTENSION) & (free <= 2 * EXTENSION)))
        and np.allclose(steps, np.rint(steps), atol=1e-6)
        and bool(np.all(np.diff(factors) >= 0))
    )


@given(logs, st.integers(0, PAIRS))
def test_legal_points_have_the_structure_and_stay_what_they_are(values: list[float], critical: int) -> None:
    space = critical_space()
    made = space.legal(values, critical_pair=critical)
    assert is_of_the_space(made)
    assert space.legal(made.logs, critical_pair=made.critical_pair) == made


def test_ntk_below_is_a_larger_base_that_gives_the_critical_pair_the_factor_s() -> None:
    larger = 1e5 * EXTENSION ** (PAIRS / REAL)  # theta s^(d / 2c), d = 2 PAIRS
    ratio = RopeScaling(64, 1e5).inv_freq / RopeScaling(64, larger).inv_freq
    assert ratio.tolist() == pytest.approx(ntk_below(EXTENSION, REAL, PAIRS).tolist())
    assert ntk_below(EXTENSION, REAL, PAIRS)[REAL] == pytest.approx(EXTENSION)


@pytest.mark.parametrize("monotone", [True, False])
def test_children_are_of_the_space(monotone: bool) -> None:
    space, random = critical_space(monotone), np.random.default_rng(0)
    population = list(critical_seeds_too().values())
    seen = set()
    for _ in range(300):
        first, other, third = (population[index] for index in random.integers(0, len(population), 3))
        for child in (mutate(first, space, random), crossover(first, other, third, space, random)):
            if monotone:
                assert is_of_the_space(child)
            seen.add(child.critical_pair)
            population.append(child)
    assert seen == set(space.critical), "every critical pair is tried"
    rises = [np.all(np.diff(child.factors) >= 0) for child in population[6:]]
    assert all(rises) == monotone


def test_moves_do_not_touch_the_pairs_below_the_critical_one() -> None:
    space = CriticalSpace(PAIRS, EXTENSION, (0,), critical=(20,))
    parent, random = space.legal(np.log(best()), critical_pair=20), np.random.default_rng(0)
    children = {mutate(parent, space, random) for _ in range(200)}
    assert {child.factors[:20] for child in children} == {parent.factors[:20]}
    assert len(children) > 150


@pytest.fixture(scope="module")
def found() -> Outcome:
    return evolve(critical_space(), critical_seeds_too(), Landscape(best(), 0), SETTINGS)


def test_the_known_best_is_found_critical_pair_included(found: Outcome) -> None:
    assert found.best.candidate.critical_pair == REAL
    assert found.best.score < 0.2 * found.best_seed.score
    assert np.abs(np.log(found.best.candidate.factors) - np.log(best())).mean() < 0.03


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_found_from_any_random_draws(seed: int) -> None:
    outcome = evolve(
        critical_space(), critical_seeds_too(), Landscape(best(), 0), dataclasses.replace(SETTINGS, seed=seed)
    )
    assert outcome.best.score < 0.35 * outcome.best_seed.score


def test_the_same_seed_gives_the_same_run(found: Outcome) -> None:
    again = evolve(critical_space(), critical_seeds_too(), Landscape(best(), 0), SETTINGS)
    assert again.scored == found.scored


def test_every_child_is_of_the_space(found: Outcome) -> None:
    assert all(is_of_the_space(one.candidate) for one in found.scored if not one.is_seed)


def test_the_seeds_have_the_theoretical_critical_pair_first_and_lower_ones() -> None:
    made = critical_seeds_too()
    assert list(made) == ["pi", "ntk", "yarn", "critical pair 20", "critical pair 16", "critical pair 12"]
    assert len(made) == SEEDS + CRITICAL_SEEDS
    theoretical = made["critical pair 20"]
    assert set(theoretical.factors[20:]) == {EXTENSION}
    assert theoretical.factors[10] == pytest.approx(EXTENSION**0.5)


@pytest.mark.parametrize(
    ("theoretical", "pairs", "choices"),
    [
        (31, 48, range(19, 32)),
        (35, 64, range(19, 36)),
        (3, 16, range(1, 4)),
        (0, 16, range(1)),
        (16, 16, range(11, 16)),
    ],
)
def test_the_critical_pair_is_looked_for_at_the_theoretical_one_and_below(
    theoretical: int, pairs: int, choices: range
) -> None:
    assert critical_choices(theoretical, pairs) == tuple(choices)


def test_a_candidate_with_a_critical_pair_survives_json_and_others_keep_their_names() -> None:
    candidate = critical_seeds_too()["critical pair 16"]
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    assert "critical_pair" not in seeds()["yarn"].to_dict()
    assert Candidate((1.0, 2.0)).id == "950dadaf2b35af51"


@pytest.mark.parametrize("critical", [(), (-1,), (PAIRS,)])
def test_critical_pairs_that_are_none_are_refused(critical: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="critical pairs: got"):
        CriticalSpace(PAIRS, EXTENSION, (0,), critical=critical)
