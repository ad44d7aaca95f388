"""The search stage: what a request means as one problem, solved."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..context import Context, Request
from ..errors import refuse
from ..inspection import critical_pair
from .budget import Budget
from .evolve import EvolutionSettings
from .needles import NeedleLoss
from .objectives import Objective, TextLoss
from .problem import Problem, planned_forwards, within
from .screening import Screen
from .seeds import CRITICAL_SEEDS, SEEDS, baselines, critical_seeds, su_attention_factor, yarn_attention_factor
from .solve import solve
from .space import Space, nearest
from .spaces import CriticalSpace, critical_choices

WINNER_FILE = "factors/winner.json"
TITLES = {"longrope": "LongRoPE", "longrope2": "LongRoPE2"}


def run_search(context: Context, budget: Budget, name: str = "search", to: int | None = None) -> dict[str, Any]:
    """Search, write `search.json` and the winner's factor file, and return the former.

    On a model that was tuned at a longer length (`context.loaded`), this is LongRoPE's second interpolation: candidates
    multiply the factors it was tuned with, and seeds follow from the wavelengths it has.

    Args:
        name: of a further search in the same run: writes `NAME.json` and `factors/NAME.json`.
        to: target length, in tokens, where it is not the request's.
    """
    return solve(context, search_problem(context, name, to), budget)


def search_problem(context: Context, name: str = "search", to: int | None = None) -> Problem:
    """Return the search that the request describes."""
    request, loaded = context.request, context.loaded
    target = context.target_length if to is None else to
    if not loaded.original_length < target <= context.target_length:
        refuse("to", target, f"above {loaded.original_length}, what the model knows, and up to {context.target_length}")
    extension = target / loaded.original_length
    space = search_space(context, extension)
    seeds = {
        method: dataclasses.replace(
            candidate,
            start_tokens=nearest(space.start_tokens, 0),
            attention_factor=nearest(space.attention_factors, candidate.attention_factor),
        )
        for method, candidate in baselines(loaded.base, loaded.original_length, extension).items()
    }
    if isinstance(space, CriticalSpace):
        seeds.update(critical_seeds(space))
    windows = context.split.search
    objective: Objective = TextLoss(windows, target, context.score_from)
    if request.objective == "needle":
        objective = NeedleLoss(windows, target, loaded.tokenizer, request.needles, request.seed)
    screened = request.screen_documents or len(windows)
    lengths = [length for length in sorted(request.screens) if context.score_from < length < target]
    files = {"winner": WINNER_FILE, "best_seed": "factors/best_seed.json"}
    return Problem(
        name,
        f"{name}.json",
        files if name == "search" else {"winner": f"factors/{name}.json"},
        TITLES[request.method],
        loaded.base,
        lambda scaling: loaded.extended(scaling, target),
        space,
        seeds,
        objective,
        evolution_settings(request),
        tuple(objective.shortened(length, screened) for length in lengths),
        request.screen_keep,
    )


def counts(request: Request, windows: int) -> tuple[int, int, str]:
    """Return, before there is a model, how many seeds a search has at most, and samples of windows, and their name."""
    seeds = SEEDS + (CRITICAL_SEEDS if request.space == "critical" else 0)
    return (
        (seeds, windows * request.needles, "needles") if request.objective == "needle" else (seeds, windows, "windows")
    )


def planned_search(request: Request, windows: int, target: int, known: int, evaluations: int | None) -> dict[int, int]:
    """Return, before there is a model, how many forwards of each length a search makes, screens included.

    Args:
        windows: of the search documents.
        known: position from which on the search scores, above 1; screens are longer.
        evaluations: its budget; None: none.
    """
    seeds, samples, _ = counts(request, windows)
    _, screened, _ = counts(request, min(request.screen_documents or windows, windows))
    screens = [
        Screen(lambda candidate: 0.0, length, screened, request.screen_keep)
        for length in sorted(request.screens)
        if known < length < target
    ]
    steps = [*((screen.length, screened) for screen in screens), (target, samples)]
    walk = len(attention_factors(request.attention_factor, target / known, known)) - 1
    planned = planned_forwards(evolution_settings(request), seeds, steps, screens, walk)
    return within(planned, target, seeds * samples, evaluations)


def check_budget(context: Context, budget: Budget) -> None:
    """Refuse a budget that does not reach for the seeds."""
    search_problem(context).require(budget)


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


def search_space(context: Context, extension: float) -> Space:
    """Build the space that the request describes, for an extension by so much."""
    request, base = context.request, context.loaded.base
    choices = (
        tuple(sorted(request.start_tokens)),
        attention_factors(request.attention_factor, extension, context.original_length),
    )
    if request.space == "critical":
        pairs = critical_choices(critical_pair(base.inv_freq.tolist(), context.original_length), base.pairs)
        return CriticalSpace(base.pairs, extension, *choices, monotone=request.monotone, critical=pairs)
    return Space(base.pairs, extension, *choices, monotone=request.monotone)


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
