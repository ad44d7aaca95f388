"""Screens rank, the target length decides, and a screen that misleads is dropped."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscape import Landscape, ramp, seeds, space

from longrope.search import Candidate, EvolutionSettings, Screen, agreement, evolve
from longrope.search.evolve import survivors_counts
from longrope.search.screening import kendall_tau, spearman_rho

SETTINGS = EvolutionSettings(population=12, iterations=8, mutations=6, crossovers=6, parents=6)
BEST = ramp(1.0, 4.6, 13.0, 1.5)


def honest(landscape: Landscape) -> Screen:
    return Screen(lambda candidate: 2.0 + landscape(candidate), length=10_240)


def test_a_screen_lets_only_its_best_go_on_to_the_target() -> None:
    landscape = Landscape(BEST)
    screen = honest(Landscape(BEST))
    outcome = evolve(space(), seeds(), landscape, SETTINGS, [screen])
    by_generation = [sum(one.generation == number for one in outcome.scored) for number in range(9)]
    assert by_generation == [3 + math.ceil(9 * 0.34), *[math.ceil(12 * 0.34)] * 8]
    for generation in range(1, 9):
        kept = [screen.scores[one.candidate.id] for one in outcome.scored if one.generation == generation]
        assert kept == sorted(kept)
    assert screen.dropped_after is None


def test_for_the_same_number_of_target_scores_a_good_screen_usually_finds_more() -> None:
    fewer = dataclasses.replace(SETTINGS, population=7, mutations=3, crossovers=2)
    wins = 0
    for seed in range(10):
        asked = [dataclasses.replace(settings, seed=seed) for settings in (SETTINGS, fewer)]
        screened = evolve(space(), seeds(), Landscape(BEST), asked[0], [honest(Landscape(BEST))])
        plain = evolve(space(), seeds(), Landscape(BEST), asked[1])
        assert abs(len(plain.scored) - len(screened.scored)) <= 8
        wins += screened.best.score < plain.best.score
    assert wins >= 7


def test_what_a_screen_loves_does_not_win_for_that() -> None:
    """The screen's favourite is bad at the target, in every generation."""
    landscape = Landscape(BEST)
    screen = Screen(lambda candidate: -candidate.factors[0], 10_240, floor=-1.0)
    outcome = evolve(space(), seeds(), landscape, SETTINGS, [screen])
    again = Landscape(BEST)
    assert [one.score for one in outcome.scored] == [again(one.candidate) for one in outcome.scored]
    assert outcome.best.score == min(again(candidate) for candidate in landscape.calls)
    assert agreement(screen.scores, {one.candidate.id: one.score for one in outcome.scored}).favourite_rank > 1


def test_parents_are_chosen_among_target_scores_alone() -> None:
    """Everything a screen turned down has no target score and never has children."""
    landscape = Landscape(BEST)
    outcome = evolve(space(), seeds(), landscape, SETTINGS, [honest(Landscape(BEST))])
    scored = {one.candidate.id[:8] for one in outcome.scored}
    for one in outcome.scored:
        if one.origin.startswith("crossover"):
            assert set(one.origin.split()[2::2]) <= scored


def test_a_misleading_screen_is_dropped_and_the_search_goes_on_without_it() -> None:
    truth = Landscape(BEST)
    screen = Screen(lambda candidate: -truth(candidate), length=10_240)
    outcome = evolve(space(), seeds(), Landscape(BEST), SETTINGS, [screen])
    assert screen.dropped_after is not None
    assert screen.least_pairs <= screen.dropped_after <= 2 * screen.least_pairs
    assert sum(one.generation == 8 for one in outcome.scored) == 12, "all children are scored at the target"
    assert outcome.best.score < 0.6 * outcome.best_seed.score


def test_a_screen_is_not_judged_by_a_handful_of_candidates() -> None:
    screen = Screen(lambda candidate: 0.0, 10_240, least_pairs=4)
    screen.scores = {"a": 1.0, "b": 2.0, "c": 3.0}
    screen.judge({"a": 3.0, "b": 2.0, "c": 1.0})
    assert screen.dropped_after is None
    screen.scores["d"] = 4.0
    screen.judge({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0})
    assert screen.dropped_after == 4


def test_controls_are_scored_though_the_screen_turned_them_down() -> None:
    settings = dataclasses.replace(SETTINGS, controls=2)
    screen = honest(Landscape(BEST))
    outcome = evolve(space(), seeds(), Landscape(BEST), settings, [screen])
    for generation in range(1, 9):
        ones = [one for one in outcome.scored if one.generation == generation]
        controls = [one for one in ones if one.origin.endswith("a control the screen turned down")]
        kept = [one for one in ones if one not in controls]
        assert (len(kept), len(controls)) == (5, 2)
        worst_kept = max(screen.scores[one.candidate.id] for one in kept)
        assert all(screen.scores[one.candidate.id] >= worst_kept for one in controls)


def test_two_screens_follow_each_other() -> None:
    calls: list[list[Candidate]] = [[], []]

    def counting(number: int, landscape: Landscape) -> Screen:
        def score(candidate: Candidate) -> float:
            calls[number].append(candidate)
            return landscape(candidate)

        return Screen(score, 1000 * (number + 1), keep=0.5)

    settings = dataclasses.replace(SETTINGS, population=3, iterations=1)
    screens = [counting(0, Landscape(BEST)), counting(1, Landscape(BEST))]
    outcome = evolve(space(), seeds(), Landscape(BEST), settings, screens)
    assert [len(calls[0]), len(calls[1]), len(outcome.scored) - 3] == [12, 6, 3]
    assert survivors_counts(12, screens, screens, 0) == [12, 6, 3]


def test_rank_correlations_of_equal_reversed_and_tied_orders() -> None:
    order = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert kendall_tau(order, order) == spearman_rho(order, order) == pytest.approx(1.0)
    assert kendall_tau(order, order[::-1]) == spearman_rho(order, order[::-1]) == pytest.approx(-1.0)
    assert kendall_tau(order, [1.0] * 5) == spearman_rho(order, [1.0] * 5) == 0.0
    # Of six pairs one is tied in x, another in y; of the four others three agree: (3 - 1) / 5.
    assert kendall_tau([1, 2, 3, 3], [1, 2, 2, 1.5]) == pytest.approx((3 - 1) / 5)


def test_unrelated_orders_hardly_agree() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=300).tolist(), random.normal(size=300).tolist()
    assert abs(kendall_tau(x, y)) < 0.1
    assert abs(spearman_rho(x, y)) < 0.15


def test_screens_are_tried_on_the_log_of_a_finished_run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from bench import screens

    found = screens.candidates(screens.RESULTS / "search_full")
    documents = list(found[0])
    assert screens.taus(found, documents, 16384) == (1.0, 1.0)
    shorter = screens.taus(found, documents, 10240)
    assert all(-1 <= tau < 1 for tau in shorter)
    monkeypatch.setattr("sys.argv", ["bench.screens"])
    screens.main()
    assert f"{shorter[0]:>6.2f}{shorter[1]:>13.2f}" in capsys.readouterr().out
