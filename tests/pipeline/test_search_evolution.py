"""The evolution on a made-up landscape whose best factors are known."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from landscape import BEST_START_TOKENS, EXTENSION, Landscape, ramp, seeds, space

from longrope.errors import UsageError
from longrope.search import Budget, Candidate, EvolutionSettings, Outcome, Screen, evolve

SETTINGS = EvolutionSettings(population=32, iterations=30, mutations=12, crossovers=12, parents=12)
INCREASING = ramp(1.0, 4.6, 13.0, 1.5)
DECREASING = ramp(4.0, 1.2, 16.0, 3.0)


def search(best: np.ndarray = INCREASING, monotone: bool = True, **changes: int) -> tuple[Outcome, Landscape]:
    landscape = Landscape(best)
    return evolve(space(monotone), seeds(), landscape, dataclasses.replace(SETTINGS, **changes)), landscape


@pytest.fixture(scope="module")
def found() -> tuple[Outcome, Landscape]:
    return search()


def test_the_best_factors_are_found_much_better_than_by_any_seed(found: tuple[Outcome, Landscape]) -> None:
    outcome, _ = found
    assert outcome.best.score < 0.2 * outcome.best_seed.score
    assert not outcome.best.is_seed
    assert np.abs(np.log(outcome.best.candidate.factors) - np.log(INCREASING)).mean() < 0.06


def test_the_best_n_hat_is_found(found: tuple[Outcome, Landscape]) -> None:
    assert found[0].best.candidate.start_tokens == BEST_START_TOKENS


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_found_from_any_random_draws(seed: int) -> None:
    outcome, _ = search(seed=seed)
    assert outcome.best.score < 0.25 * outcome.best_seed.score


def test_every_candidate_obeys_the_monotone_rule(found: tuple[Outcome, Landscape]) -> None:
    for candidate in found[1].calls:
        assert np.all(np.diff(candidate.factors) >= 0)


def test_without_the_monotone_rule_decreasing_factors_are_found() -> None:
    ruled, _ = search(DECREASING, monotone=True)
    free, _ = search(DECREASING, monotone=False)
    assert np.any(np.diff(free.best.candidate.factors) < 0)
    assert free.best.score < 0.5 * ruled.best.score


def test_the_same_seed_gives_the_same_run(found: tuple[Outcome, Landscape]) -> None:
    again, _ = search()
    assert again.scored == found[0].scored
    assert again.stopped == found[0].stopped


@pytest.mark.parametrize(("monotone", "history"), [(True, "1cb3b5c51d1444ab"), (False, "31cbbf958fae6390")])
def test_the_same_children_are_drawn_as_ever(monotone: bool, history: str) -> None:
    """Else a run that was begun before cannot go on: its log holds the scores of other candidates."""
    settings = EvolutionSettings(population=20, iterations=8, mutations=6, crossovers=6, parents=6, controls=1, seed=3)
    wide = dataclasses.replace(space(monotone), attention_factors=(1.0, 1.03, 1.06))
    screen = Screen(Landscape(INCREASING), length=1000, keep=0.5)
    outcome = evolve(wide, seeds(), Landscape(INCREASING), settings, [screen])
    ids = "".join(one.candidate.id for one in outcome.scored)
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == history


def test_another_seed_gives_another_run(found: tuple[Outcome, Landscape]) -> None:
    other, _ = search(seed=1)
    assert [one.candidate for one in other.scored[:3]] == [one.candidate for one in found[0].scored[:3]]
    assert [one.candidate for one in other.scored] != [one.candidate for one in found[0].scored]


def test_no_candidate_is_scored_twice(found: tuple[Outcome, Landscape]) -> None:
    ids = [candidate.id for candidate in found[1].calls]
    assert len(ids) == len(set(ids))


def test_sizes_are_those_asked_for(found: tuple[Outcome, Landscape]) -> None:
    by_generation = [sum(one.generation == number for one in found[0].scored) for number in range(31)]
    assert by_generation == [32, *[24] * 30]
    later = [one.origin.split()[0] for one in found[0].scored if one.generation > 0]
    assert later.count("mutation") == later.count("crossover") == 360


def test_children_descend_from_candidates_scored_before_them(found: tuple[Outcome, Landscape]) -> None:
    known: dict[int, set[str]] = {}
    for one in found[0].scored:
        known.setdefault(one.generation, set()).add(one.candidate.id[:8])
    for one in found[0].scored:
        if one.is_seed:
            continue
        before = set().union(*(ids for generation, ids in known.items() if generation < max(one.generation, 1)))
        assert {word for word in one.origin.split() if len(word) == 8 and word != "mutation"} - before == set()


@pytest.mark.parametrize("parents", [2, 12])
def test_a_crossover_has_two_parents(parents: int) -> None:
    outcome, _ = search(parents=parents, iterations=5)
    pairs = [one.origin.split()[2::2] for one in outcome.scored if one.origin.startswith("crossover of ")]
    assert len(pairs) == 60
    assert all(first != other for first, other in pairs)


def test_the_seeds_come_first_and_are_never_lost() -> None:
    outcome, landscape = search(population=1, iterations=0)
    assert [one.origin for one in outcome.scored] == ["seed pi", "seed ntk", "seed yarn"]
    assert outcome.best is outcome.best_seed
    assert outcome.best.score == min(landscape(candidate) for candidate in seeds().values())


def test_a_seed_that_cannot_be_beaten_wins() -> None:
    yarn = seeds()["yarn"]
    outcome = evolve(space(start_tokens=(0,)), seeds(), Landscape(np.asarray(yarn.factors), 0), SETTINGS)
    assert outcome.best.candidate == yarn
    assert outcome.best.origin == "seed yarn"


class Warm(Landscape):
    """The landscape with a best attention factor, whatever the factors are."""

    def __call__(self, candidate: Candidate) -> float:
        return super().__call__(candidate) + 10 * (candidate.attention_factor - self.attention_factor) ** 2

    attention_factor = 1.04


def walked(evaluations: int | None = None, start: float = 1.1) -> tuple[Outcome, Warm]:
    budget, landscape = Budget(evaluations), Warm(INCREASING)

    def objective(candidate: Candidate) -> float:
        budget.spend(100, 1.0)
        return landscape(candidate)

    choices = tuple(round(1 + 0.02 * step, 2) for step in range(8))
    started = {name: dataclasses.replace(one, attention_factor=start) for name, one in seeds().items()}
    settings = dataclasses.replace(SETTINGS, iterations=0)
    there = dataclasses.replace(space(), attention_factors=choices)
    outcome = evolve(there, started, objective, settings, affords=lambda counts: budget.affords({100: counts[-1]}))
    return outcome, landscape


@pytest.mark.parametrize("start", [1.0, 1.02, 1.04, 1.1, 1.14])
def test_generation_0_walks_the_best_seed_to_the_best_attention_factor(start: float) -> None:
    outcome, _ = walked(start=start)
    walk = [one for one in outcome.scored if one.origin.startswith("attention factor of ")]
    assert min([outcome.best_seed, *walk], key=lambda one: one.score).candidate.attention_factor == 1.04
    assert {one.candidate.factors for one in walk} == {outcome.best_seed.candidate.factors}
    assert len(walk) <= round(abs(start - 1.04) / 0.02) + 2
    assert len(outcome.scored) == SETTINGS.population, "the walk is a part of generation 0"


@pytest.mark.parametrize("evaluations", [3, 4, 5, 6])
def test_a_budget_that_ends_during_the_walk_keeps_what_it_found(evaluations: int) -> None:
    outcome, landscape = walked(evaluations)
    assert len(landscape.calls) == len(outcome.scored) == evaluations
    assert outcome.best.candidate.attention_factor == pytest.approx(1.1 - 0.02 * (evaluations - 3))
    assert outcome.stopped == "the budget is spent"


@pytest.mark.parametrize("evaluations", [3, 4, 17, 50, 200])
def test_the_budget_is_spent_and_not_exceeded(evaluations: int) -> None:
    budget, landscape = Budget(evaluations), Landscape(INCREASING)

    def objective(candidate: Candidate) -> float:
        budget.spend(100, 1.0)
        return landscape(candidate)

    outcome = evolve(space(), seeds(), objective, SETTINGS, affords=lambda counts: budget.affords({100: counts[-1]}))
    assert len(landscape.calls) == evaluations
    assert outcome.stopped == "the budget is spent"


def test_a_space_of_few_points_ends_the_search() -> None:
    few = dataclasses.replace(space(start_tokens=(0,)), pairs=1, upper=1.02)
    outcome = evolve(few, {"pi": Candidate((1.0,))}, lambda candidate: candidate.factors[0], SETTINGS)
    assert len(outcome.scored) == 3
    assert outcome.stopped == "no new candidates left in the space"


def test_a_score_that_is_not_a_number_never_wins() -> None:
    landscape = Landscape(INCREASING)

    def objective(candidate: Candidate) -> float:
        return math.nan if candidate == seeds()["pi"] else landscape(candidate)

    outcome = evolve(space(), seeds(), objective, dataclasses.replace(SETTINGS, iterations=5))
    assert outcome.best.score == min(one.score for one in outcome.scored[1:])
    assert outcome.best_seed.origin != "seed pi"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"population": 0}, "--population: got 0, expected an int >= 1"),
        ({"parents": 0}, "--parents: got 0, expected an int >= 1"),
        ({"iterations": -1}, "--iterations: got -1, expected an int >= 0"),
        ({"mutations": -2}, "--mutations: got -2, expected an int >= 0"),
        ({"crossovers": -3}, "--crossovers: got -3, expected an int >= 0"),
        ({"controls": -4}, "--screen-controls: got -4, expected an int >= 0"),
        ({"seed": -5}, "--seed: got -5, expected an int >= 0"),
        ({"mutation_probability": 1.5}, "--mutation-probability: got 1.5, expected a number between 0 and 1"),
        ({"mutation_probability": math.nan}, "--mutation-probability: got nan, expected a number between 0 and 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: dict[str, float], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        dataclasses.replace(SETTINGS, **changes)
    assert str(refused.value) == line


def test_the_seeds_of_the_landscape_are_within_its_space() -> None:
    assert all(max(candidate.factors) <= 1.25 * EXTENSION for candidate in seeds().values())


def test_all_that_can_be_scored_at_once_is_announced_before_the_first_of_it_is() -> None:
    """What lets other ranks begin: of every batch, and of nothing that is not scored."""
    objective, screening = Landscape(INCREASING), Landscape(INCREASING)
    screen = Screen(screening, length=64, keep=0.5)
    announced: dict[int, list[str]] = {id(objective): [], id(screening): []}
    batches = []

    def announce(score: Callable[[Candidate], float], candidates: Sequence[Candidate]) -> None:
        landscape = objective if score is objective else screening
        assert len(landscape.calls) >= len(announced[id(landscape)]), "what was announced before is scored by now"
        announced[id(landscape)] += [candidate.id for candidate in candidates]
        batches.append(len(candidates))

    settings = dataclasses.replace(SETTINGS, iterations=3)
    outcome = evolve(space(), seeds(), objective, settings, [screen], announce=announce)
    walked = {one.candidate.id for one in outcome.scored if one.origin.startswith("attention factor of ")}
    assert [one.id for one in objective.calls if one.id not in walked] == announced[id(objective)]
    assert sorted(one.id for one in screening.calls) == sorted(announced[id(screening)])
    assert max(batches) >= settings.mutations + settings.crossovers
