"""One search, whatever its method: what may be chosen, where it starts, and what a candidate is scored by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import longrope_kernels as lk

from ..errors import refuse
from ..evaluate.scoring import Scorer
from ..team import Forward
from .budget import Budget
from .evolve import EvolutionSettings, survivors_counts
from .objectives import Objective
from .screening import Screen
from .space import Candidate, Space


@dataclass(frozen=True)
class Problem:
    """All that decides a search but the model and the budget.

    Attributes:
        name: of its stage in the log: `search`, whose screens are `screen`, or any other, `NAME screen`.
        result_file: where what `solve` returns is written, JSON.
        factor_files: where the winner's factors, and the best seed's, are written.
        method: what the report calls it.
        base: the regime that candidates multiply.
        ladder: from a candidate's regime to the ladder in which it serves the objective's length.
        screens: the same objective on less, the cheapest first.
        screen_keep: share of the candidates that a screen lets pass.
    """

    name: str
    result_file: str
    factor_files: Mapping[str, str]
    method: str
    base: lk.RopeScaling
    ladder: Callable[[lk.RopeScaling], lk.LongRope]
    space: Space
    seeds: Mapping[str, Candidate]
    objective: Objective
    settings: EvolutionSettings
    screens: tuple[Objective, ...] = ()
    screen_keep: float = 0.34

    def rope(self, candidate: Candidate) -> lk.LongRope:
        """Return the ladder that serves the objective's length by a candidate."""
        return self.ladder(candidate.scaling(self.base))

    def forwards(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """Return lengths and numbers of forwards that so many candidates cost, by screen and last by the objective."""
        steps = (*self.screens, self.objective)
        return [(step.length, count * len(step.samples)) for step, count in zip(steps, counts, strict=True)]

    def planned(self, screens: Sequence[Screen]) -> dict[int, int]:
        """Return how many forwards of each length the settings mean, without any budget."""
        steps = [(step.length, len(step.samples)) for step in (*self.screens, self.objective)]
        walk = len(self.space.attention_factors) - 1
        return planned_forwards(self.settings, len(self.seeds), steps, screens, walk)

    def require(self, budget: Budget) -> None:
        """Refuse a budget that does not reach for the seeds, without which there is nothing to search from."""
        needed = len(self.seeds) * len(self.objective.samples)
        if budget.evaluations is not None and budget.evaluations < needed:
            names = ", ".join(self.seeds)
            refuse("--budget", budget.evaluations, f"at least {needed}: {names} on every {self.objective.unit}")


def planned_forwards(
    settings: EvolutionSettings, seeds: int, steps: Sequence[tuple[int, int]], screens: Sequence[Screen], walk: int = 0
) -> dict[int, int]:
    """Return how many forwards of each length an evolution means at most, without any budget.

    Args:
        seeds: their number.
        steps: length and samples of every screen, the cheapest first, and last of the objective.
        screens: one for each step but the last.
        walk: candidates of the walk along the attention factor, which no screen reads.
    """
    totals = dict.fromkeys((length for length, _ in steps), 0)
    children = [settings.mutations + settings.crossovers] * settings.iterations
    children.insert(0, max(settings.population - seeds - walk, 0))
    counts = [survivors_counts(count, screens, screens, settings.controls) for count in children]
    for some in ([seeds] * len(steps), [*([0] * len(screens)), walk], *counts):
        for (length, samples), number in zip(steps, some, strict=True):
            totals[length] += samples * number
    return totals


def within(planned: Mapping[int, int], length: int, seeds: int, evaluations: int | None) -> dict[int, int]:
    """Return what a budget leaves of planned forwards: those of the seeds, and of all others the same share.

    Args:
        length: of the objective, which gets what rounding leaves.
        seeds: forwards of that length without which there is no search.

    Examples:
        >>> within({1000: 40, 2000: 26}, 2000, 6, 36)
        {1000: 20, 2000: 16}
    """
    total = sum(planned.values())
    if evaluations is None or evaluations >= total:
        return dict(planned)
    share = (evaluations - seeds) / max(total - seeds, 1)
    found = {tokens: int(share * count) for tokens, count in planned.items()}
    return found | {length: evaluations - sum(count for tokens, count in found.items() if tokens != length)}


class ModelScore:
    """The score of a candidate by an objective: from the log, or forwards of the model within the budget."""

    def __init__(self, problem: Problem, objective: Objective, scorer: Scorer, budget: Budget) -> None:
        self.problem, self.objective, self.scorer, self.budget = problem, objective, scorer, budget
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.stage = problem.name
        if objective is not problem.objective:
            self.stage = "screen" if problem.name == "search" else f"{problem.name} screen"

    def announce(self, candidates: Sequence[Candidate]) -> None:
        """Let other ranks begin with what will be scored next."""
        self.scorer.announce(forward for candidate in candidates for forward in self._forwards(candidate))

    def __call__(self, candidate: Candidate) -> float:
        records = []
        for forward in self._forwards(candidate):
            record = self.scorer.score(forward.window, forward.rope, forward.length, forward.start, **forward.about)
            self.budget.spend(forward.length, record["seconds"])
            records.append(record)
        self.records[candidate.id] = records
        return float(sum(record["nll"] for record in records) / len(records))

    def _forwards(self, candidate: Candidate) -> list[Forward]:
        rope, about = self.problem.rope(candidate), {"stage": self.stage, "candidate": candidate.to_dict()}
        return [Forward(one.window, rope, one.length, one.start, about) for one in self.objective.samples]
