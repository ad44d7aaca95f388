"""One search, from its problem to its files: the evolution over a loaded model, logged so that it resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .. import factors
from ..context import Context, versions
from ..evaluate.scoring import Scorer
from ..progress import Task, clock, say, task
from .budget import Budget, forward_cost
from .evolve import Outcome, Scored, evolve
from .problem import ModelScore, Problem
from .screening import Screen, agreement
from .space import Candidate


def solve(context: Context, problem: Problem, budget: Budget) -> dict[str, Any]:
    """Search, write the problem's files, and return what its result file holds."""
    problem.require(budget)
    scorer = Scorer(context.loaded, context.run.evaluations, team=context.team)
    objective = ModelScore(problem, problem.objective, scorer, budget)
    screens = [
        Screen(ModelScore(problem, one, scorer, budget), one.length, len(one.samples), problem.screen_keep)
        for one in problem.screens
    ]
    planned = problem.planned(screens)
    say_plan(context, problem, screens, planned, budget)

    def affords(counts: Sequence[int]) -> bool:
        return budget.affords({length: count for length, count in problem.forwards(counts) if count})

    with task(problem.name, 1.0) as work:
        watch = _Watch(work, budget, planned, scorer)
        outcome = evolve(
            problem.space, problem.seeds, objective, problem.settings, screens, affords, watch.scored, _announce
        )
    result = summary(problem, outcome, objective, screens, budget)
    write_factors(context, problem, outcome, result)
    context.run.write_json(problem.result_file, result)
    say_result(outcome, result)
    return result


def say_plan(
    context: Context, problem: Problem, screens: Sequence[Screen], planned: dict[int, int], budget: Budget
) -> None:
    """Print what the search will do before it starts."""
    space, settings = problem.space, problem.settings
    say()
    say(
        f"Search plan: {problem.method}, {problem.objective.where}; {space.words}, n-hat in "
        f"{list(space.start_tokens)}, attention factor {_range(space.attention_factors)}"
    )
    say(
        f"  population {settings.population}, then {settings.iterations} x ({settings.mutations} mutations + "
        f"{settings.crossovers} crossovers) of the best {settings.parents}; seed {settings.seed}"
    )
    for one in problem.screens:
        say(f"  screening at {one.where}: the best {problem.screen_keep:.0%} go on")
    total = sum(planned.values())
    cost = sum(count * forward_cost(length) for length, count in planned.items())
    bounds = []
    if budget.evaluations is not None:
        bounds.append(f"{budget.evaluations} evaluations")
    if budget.seconds is not None:
        bounds.append(f"{clock(budget.seconds)} of evaluations")
    pace = measured_pace(context)
    all_of_it = f"{total} evaluations in all" + (f", {clock(cost * pace)} at the pace so far" if pace else "")
    say(f"  {all_of_it}; budget: {' or '.join(bounds) + ', whichever is first' if bounds else 'none, all of it'}")


def measured_pace(context: Context) -> float | None:
    """Return seconds per unit of `forward_cost` of the evaluations in the log, or None before the first."""
    known = [record for record in context.run.evaluations.records.values() if record.get("seconds")]
    cost = sum(forward_cost(record["length"]) for record in known)
    return sum(record["seconds"] for record in known) / cost if known else None


def summary(
    problem: Problem, outcome: Outcome, objective: ModelScore, screens: Sequence[Screen], budget: Budget
) -> dict[str, Any]:
    """Return the content of the result file."""
    best, seed = outcome.best, outcome.best_seed
    target = {one.candidate.id: one.score for one in outcome.scored}
    difference = problem.objective.difference(
        objective.records[best.candidate.id], objective.records[seed.candidate.id]
    )
    return {
        "format": "longrope-search/1",
        "method": problem.method,
        "objective": problem.objective.name,
        "winner": _scored(best),
        "winner_is_a_seed": best.is_seed,
        "best_seed": _scored(seed),
        "winner_minus_best_seed": difference.to_dict(),
        "history": [_scored(one) for one in outcome.scored],
        "screens": [
            {
                "length": screen.length,
                "documents": screen.documents,
                "where": one.where,
                "keep": screen.keep,
                "scores": screen.scores,
                "agreement": agreement(screen.scores, target).to_dict(),
                "dropped_after_pairs": screen.dropped_after,
            }
            for screen, one in zip(screens, problem.screens, strict=True)
        ],
        "stopped": outcome.stopped,
        "generations": outcome.generations,
        "evaluations": budget.spent_evaluations,
        "seconds": round(budget.spent_seconds, 1),
        "budget": {"evaluations": budget.evaluations, "seconds": budget.seconds},
        "settings": dataclasses.asdict(problem.settings),
        "space": problem.space.to_dict(),
        "score_from": min(sample.start for sample in problem.objective.samples),
        "target_length": problem.objective.length,
    }


def write_factors(context: Context, problem: Problem, outcome: Outcome, result: dict[str, Any]) -> None:
    """Write the factor files of the winner and of the best seed, where the problem wants them."""
    loaded = context.loaded
    for name, scored in (("winner", outcome.best), ("best_seed", outcome.best_seed)):
        if name not in problem.factor_files:
            continue
        what = problem.objective.describe()
        content = factors.describe(
            problem.rope(scored.candidate),
            loaded.name,
            scored.origin,
            scored.candidate,
            {"what": what.pop("what"), "value": scored.score, **what},
            provenance(context, evaluations=result["evaluations"]),
        )
        keep_time(context, problem.factor_files[name], content)


def provenance(context: Context, **more: Any) -> dict[str, Any]:
    """Return what a factor file says of how it was made."""
    return {
        "versions": versions(),
        "dtype": context.loaded.dtype,
        "seed": context.request.seed,
        **more,
        "model_fingerprint": context.run.settings["model_fingerprint"],
    }


def keep_time(context: Context, file: str, content: dict[str, Any]) -> None:
    """Write a factor file; a resumed run that finds the same leaves the same."""
    before = context.run.read_json(file)
    if before is not None:
        content["provenance"]["created"] = before["provenance"]["created"]
    context.run.write_json(file, content)


def say_result(outcome: Outcome, result: dict[str, Any]) -> None:
    best, seed = outcome.best, outcome.best_seed
    say(
        f"Search done: {result['stopped']}; {result['evaluations']} evaluations, {clock(result['seconds'])} of forwards"
    )
    if best.is_seed:
        say(f"  winner: {best.origin}, loss {best.score:.4f}; nothing found was better on the search documents")
    else:
        difference = result["winner_minus_best_seed"]
        say(
            f"  winner: found ({best.origin}, generation {best.generation}), loss {best.score:.4f}; "
            f"best seed ({seed.origin[5:]}) {seed.score:.4f}; difference {difference['mean']:+.4f} "
            f"[{difference['low']:+.4f}, {difference['high']:+.4f}] on the search documents"
        )
    if best.candidate.critical_pair is not None:
        say(f"  critical pair {best.candidate.critical_pair}: NTK below, factors of their own from there on")
    for screen in result["screens"]:
        found = screen["agreement"]
        say(
            f"  screen at {screen['where']} against the target: Kendall tau "
            f"{found['tau']:.2f} over {found['pairs']} candidates; its favourite is number "
            f"{found['favourite_rank']} at the target"
            + (f"; dropped after {screen['dropped_after_pairs']}" if screen["dropped_after_pairs"] else "")
        )


def _announce(score: Callable[[Candidate], float], candidates: Sequence[Candidate]) -> None:
    assert isinstance(score, ModelScore)
    score.announce(candidates)


class _Watch:
    """Turns evaluations into progress."""

    def __init__(self, work: Task, budget: Budget, planned: dict[int, int], scorer: Scorer) -> None:
        self.work, self.budget = work, budget
        self.planned_cost = sum(count * forward_cost(length) for length, count in planned.items())
        self.cost = 0.0
        self.best: Scored | None = None
        scorer.on_new = lambda length, seconds: self.forward(length, False)
        scorer.on_known = lambda length: self.forward(length, True)

    def forward(self, length: int, known: bool) -> None:
        self.cost += forward_cost(length)
        share = max(self.budget.done, self.cost / self.planned_cost)
        step = max(min(share, 1.0) - self.work.done, 0.0)
        note = f"{self.budget.spent_evaluations + 1} evaluations"
        if self.best is not None:
            note += f", best {self.best.score:.4f} ({self.best.origin})"
        (self.work.skip if known else self.work.advance)(step, note)

    def scored(self, scored: Scored) -> None:
        if self.best is None or scored.score < self.best.score:
            self.best = scored


def _scored(scored: Scored) -> dict[str, Any]:
    return {
        "id": scored.candidate.id,
        "candidate": scored.candidate.to_dict(),
        "score": scored.score,
        "origin": scored.origin,
        "generation": scored.generation,
    }


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
