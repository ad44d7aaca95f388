"""The search stage: the evolution over a loaded model, within a budget, logged so that it resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import longrope_kernels as lk

from .. import factors
from ..context import Context, Request, versions
from ..data import Window
from ..errors import refuse
from ..evaluate.bootstrap import paired_difference
from ..evaluate.scoring import Scorer
from ..progress import Task, clock, say, task
from ..team import Forward
from .budget import Budget, forward_cost
from .evolve import EvolutionSettings, Outcome, Scored, evolve, survivors_counts
from .screening import Screen, agreement, describe
from .seeds import SEED_NAMES, baselines, su_attention_factor, yarn_attention_factor
from .space import Candidate, Space, nearest

WINNER_FILE = "factors/winner.json"


class ModelObjective:
    """Mean loss of the search documents over the positions the original model cannot reach."""

    def __init__(
        self, context: Context, scorer: Scorer, budget: Budget, length: int, windows: Sequence[Window]
    ) -> None:
        self.context, self.scorer, self.budget, self.length, self.windows = context, scorer, budget, length, windows
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.stage = "search" if length == context.target_length else "screen"

    def announce(self, candidates: Sequence[Candidate]) -> None:
        """Let other ranks begin with what will be scored next."""
        score_from = self.context.score_from
        self.scorer.announce(
            Forward(window, rope, self.length, score_from, {"stage": self.stage, "candidate": candidate.to_dict()})
            for candidate, rope in ((candidate, self.ladder(candidate)) for candidate in candidates)
            for window in self.windows
        )

    def ladder(self, candidate: Candidate) -> lk.LongRope:
        """Return the original up to its length and the candidate beyond it."""
        loaded = self.context.loaded
        return loaded.extended(candidate.scaling(loaded.base), self.context.target_length)

    def __call__(self, candidate: Candidate) -> float:
        rope = self.ladder(candidate)
        records = []
        for window in self.windows:
            record = self.scorer.score(
                window,
                rope,
                self.length,
                self.context.score_from,
                stage=self.stage,
                candidate=candidate.to_dict(),
            )
            self.budget.spend(self.length, record["seconds"])
            records.append(record)
        self.records[candidate.id] = records
        return sum(record["nll"] for record in records) / len(records)


def run_search(context: Context, budget: Budget) -> dict[str, Any]:
    """Search, write `search.json` and the winner's factor file, and return the former."""
    request, loaded = context.request, context.loaded
    windows = context.split.search
    space = search_space(context)
    settings = evolution_settings(request)
    seeds = {
        name: dataclasses.replace(
            candidate,
            start_tokens=nearest(space.start_tokens, 0),
            attention_factor=nearest(space.attention_factors, candidate.attention_factor),
        )
        for name, candidate in baselines(loaded.base, context.original_length, context.extension).items()
    }
    check_budget(context, budget)
    scorer = Scorer(loaded, context.run.evaluations, team=context.team)
    objective = ModelObjective(context, scorer, budget, context.target_length, windows)
    screened = windows[: request.screen_documents or len(windows)]
    screens = [
        Screen(ModelObjective(context, scorer, budget, length, screened), length, len(screened), request.screen_keep)
        for length in sorted(request.screens)
        if context.score_from < length < context.target_length
    ]
    planned = planned_forwards(settings, screens, len(seeds), context)
    say_plan(planned, budget, settings, space, windows, screens, context)

    def affords(counts: Sequence[int]) -> bool:
        return budget.affords({length: count for length, count in forwards(counts, screens, context) if count})

    with task("search", 1.0) as work:
        watch = _Watch(work, budget, planned, scorer)
        outcome = evolve(space, seeds, objective, settings, screens, affords, watch.scored, _announce)
    result = summary(context, outcome, objective, screens, budget, settings, space)
    write_winner(context, outcome, result)
    context.run.write_json("search.json", result)
    say_result(outcome, result)
    return result


def check_budget(context: Context, budget: Budget) -> None:
    """Refuse a budget that does not reach for the seeds, without which there is nothing to search from."""
    needed = len(SEED_NAMES) * len(context.split.search)
    if budget.evaluations is not None and budget.evaluations < needed:
        refuse("--budget", budget.evaluations, f"at least {needed}: {', '.join(SEED_NAMES)} on every search document")


def evolution_settings(request: Request) -> EvolutionSettings:
    """Take the sizes of the evolution from a request; checks them."""
    return EvolutionSettings(
        request.population,
        request.iterations,
        request.mutations,
        request.crossovers,
        request.mutation_probability,
        request.parents,
        request.screen_controls,
        request.seed,
    )


def search_space(context: Context) -> Space:
    """Build the space that the request describes."""
    request = context.request
    return Space(
        context.loaded.base.pairs,
        context.extension,
        tuple(sorted(request.start_tokens)),
        attention_factors(request.attention_factor, context.extension, context.original_length),
        monotone=request.monotone,
    )


def attention_factors(choice: str, extension: float, original_length: int) -> tuple[float, ...]:
    """Return the choices that `--attention-factor` leaves: a number, yarn, su, or search."""
    yarn = yarn_attention_factor(extension)
    if choice == "yarn":
        return (yarn,)
    if choice == "su":
        return (su_attention_factor(extension, original_length),)
    if choice == "search":
        return tuple(round(1.0 + (yarn - 1.0) * step / 4, 6) for step in range(9))
    try:
        value = float(choice)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        refuse("--attention-factor", choice, "a number > 0, yarn, su or search")
    return (value,)


def forwards(counts: Sequence[int], screens: Sequence[Screen], context: Context) -> list[tuple[int, int]]:
    """Return lengths and numbers of forwards that so many candidates cost, by screen and last by the objective."""
    lengths = [*(screen.length for screen in screens), context.target_length]
    documents = [*(screen.documents for screen in screens), len(context.split.search)]
    return [(length, count * number) for length, count, number in zip(lengths, counts, documents, strict=True)]


def planned_forwards(
    settings: EvolutionSettings, screens: Sequence[Screen], seeds: int, context: Context
) -> dict[int, int]:
    """Return how many forwards of each length the settings mean, without any budget."""
    totals = dict(forwards([seeds] * (len(screens) + 1), screens, context))
    children = [max(settings.population - seeds, 0)] + [settings.mutations + settings.crossovers] * settings.iterations
    for count in children:
        for length, number in forwards(survivors_counts(count, screens, screens, settings.controls), screens, context):
            totals[length] += number
    return totals


def say_plan(
    planned: dict[int, int],
    budget: Budget,
    settings: EvolutionSettings,
    space: Space,
    windows: Sequence[Window],
    screens: Sequence[Screen],
    context: Context,
) -> None:
    """Print what the search will do before it starts."""
    say()
    say(
        f"Search plan: {len(windows)} documents, {context.target_length:,} tokens of each, scored from position "
        f"{context.score_from:,}; factors in [{space.lower:g}, {space.largest:g}], n-hat in "
        f"{list(space.start_tokens)}, attention factor {_range(space.attention_factors)}"
    )
    say(
        f"  population {settings.population}, then {settings.iterations} x ({settings.mutations} mutations + "
        f"{settings.crossovers} crossovers) of the best {settings.parents}; seed {settings.seed}"
    )
    for screen in screens:
        say(f"  screening at {screen.where}: the best {screen.keep:.0%} go on")
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
    context: Context,
    outcome: Outcome,
    objective: ModelObjective,
    screens: Sequence[Screen],
    budget: Budget,
    settings: EvolutionSettings,
    space: Space,
) -> dict[str, Any]:
    """Return the content of `search.json`."""
    best, seed = outcome.best, outcome.best_seed
    target = {one.candidate.id: one.score for one in outcome.scored}
    difference = paired_difference(
        objective.records[best.candidate.id],
        objective.records[seed.candidate.id],
        context.score_from,
        context.target_length,
    )
    return {
        "format": "longrope-search/1",
        "winner": _scored(best),
        "winner_is_a_seed": best.is_seed,
        "best_seed": _scored(seed),
        "winner_minus_best_seed": difference.to_dict(),
        "history": [_scored(one) for one in outcome.scored],
        "screens": [
            {
                "length": screen.length,
                "documents": screen.documents,
                "keep": screen.keep,
                "scores": screen.scores,
                "agreement": agreement(screen.scores, target).to_dict(),
                "dropped_after_pairs": screen.dropped_after,
            }
            for screen in screens
        ],
        "stopped": outcome.stopped,
        "generations": outcome.generations,
        "evaluations": budget.spent_evaluations,
        "seconds": round(budget.spent_seconds, 1),
        "budget": {"evaluations": budget.evaluations, "seconds": budget.seconds},
        "settings": dataclasses.asdict(settings),
        "space": space.to_dict(),
        "score_from": context.score_from,
        "target_length": context.target_length,
    }


def write_winner(context: Context, outcome: Outcome, result: dict[str, Any]) -> None:
    """Write the factor files of the winner and of the best seed."""
    loaded = context.loaded
    for name, scored in (("winner", outcome.best), ("best_seed", outcome.best_seed)):
        content = factors.describe(
            loaded.extended(scored.candidate.scaling(loaded.base), context.target_length),
            loaded.name,
            scored.origin,
            scored.candidate,
            {
                "what": "mean negative log-likelihood in nats per token",
                "value": scored.score,
                "positions": [context.score_from, context.target_length],
                "documents": [window.describe() for window in context.split.search],
            },
            {
                "versions": versions(),
                "dtype": loaded.dtype,
                "seed": context.request.seed,
                "evaluations": result["evaluations"],
                "model_fingerprint": context.run.settings["model_fingerprint"],
            },
        )
        before = context.run.read_json(f"factors/{name}.json")
        if before is not None:  # a resumed run that finds the same leaves the same file
            content["provenance"]["created"] = before["provenance"]["created"]
        context.run.write_json(f"factors/{name}.json", content)


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
    for screen in result["screens"]:
        found = screen["agreement"]
        say(
            f"  screen at {describe(screen['length'], screen['documents'])} against the target: Kendall tau "
            f"{found['tau']:.2f} over {found['pairs']} candidates; its favourite is number "
            f"{found['favourite_rank']} at the target"
            + (f"; dropped after {screen['dropped_after_pairs']}" if screen["dropped_after_pairs"] else "")
        )


def _announce(score: Callable[[Candidate], float], candidates: Sequence[Candidate]) -> None:
    assert isinstance(score, ModelObjective)
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
