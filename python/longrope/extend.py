"""`longrope extend`: every stage in a row, each resumable, into one run directory."""

from __future__ import annotations

import time
from typing import Any

from . import factors
from .context import Context
from .evaluate.stage import OURS, run_evaluation, say_evaluation
from .export.stage import run_export, say_export
from .inspection import Inspection, inspect_rope
from .plan import Stage, make_plan, say_plan
from .progress import clock, console, say
from .report import write_report
from .search.budget import Budget
from .search.stage import WINNER_FILE, check_budget, planned_search, run_search


def extend(context: Context, budget: Budget) -> dict[str, Any]:
    """Inspect, measure the baselines, search, evaluate on held-out documents, export, reload, report."""
    began = time.monotonic()
    _stage(1, "inspect")
    say_inspection(run_inspection(context))
    check_budget(context, budget)
    say_stages(context, budget)
    _stage(2, "baselines on held-out documents")
    say_evaluation(run_evaluation(context, None, "baselines.json", "baselines"))
    _stage(3, "search")
    run_search(context, budget)
    rope, content = factors.read(context.run.path / WINNER_FILE, context.loaded.base)
    _stage(4, "the result on held-out documents")
    heldout = run_evaluation(context, rope, what="evaluate")
    say_evaluation(heldout)
    _stage(5, "export and reload")
    exported = run_export(context, rope, content)
    say_export(exported)
    _stage(6, "report")
    page = write_report(context.run.path)
    ours, others = heldout["methods"][OURS], heldout["methods"]
    best = min(("pi", "ntk", "yarn"), key=lambda name: others[name]["nll"])
    say(f"{page}, made in {clock(time.monotonic() - began)}")
    say(
        f"Held-out perplexity over positions {heldout['original_length']:,}-{heldout['target_length']:,}: "
        f"original {others['original']['perplexity']:.2f}, {others[best]['title']} {others[best]['perplexity']:.3f}, "
        f"ours {ours['perplexity']:.3f}"
    )
    return heldout


def say_stages(context: Context, budget: Budget) -> dict[str, Any]:
    """Say what `extend` would do and what it takes, and return it."""
    loaded, request, target = context.loaded, context.request, context.target_length
    documents = len(context.split.heldout)
    searched = planned_search(request, len(context.split.search), target, context.score_from, budget.evaluations)
    stages = [
        Stage.search("search", "search", searched, budget.seconds),
        Stage("evaluate", "evaluate", target, (5 + 3 * len(context.passkey_depths)) * documents),
    ]
    notes = [] if budget.seconds is None else [f"the search stops after {clock(budget.seconds)} of forwards"]
    plan = make_plan(loaded, context.original_length, target, stages, notes=notes)
    say_plan(plan)
    return plan


def run_inspection(context: Context) -> Inspection:
    """Write `inspection.json` and return it as an object."""
    loaded = context.loaded
    found = inspect_rope(loaded.rope, loaded.name, loaded.model.config.model_type, context.target_length)
    context.run.write_json("inspection.json", found.to_dict())
    return found


def say_inspection(inspection: Inspection) -> None:
    """Print the pairs around the critical one, and what they mean."""
    from rich.table import Table

    total = len(inspection.pairs)
    target = "" if inspection.target_length is None else f", to be extended to {inspection.target_length:,}"
    say(
        f"{inspection.model} ({inspection.model_type}): {total} rotary pairs of head_dim {inspection.head_dim}, theta "
        f"{inspection.theta:,.0f}, trained to {inspection.original_length:,} tokens{target}"
    )
    table = Table()
    for heading in ("pair", "wavelength, tokens", "turns in training", "turns at the target"):
        table.add_column(heading, justify="right")
    for pair in inspection.pairs:
        at_target = "" if pair.periods_at_target is None else f"{pair.periods_at_target:,.3f}"
        style = "bold" if pair.pair == inspection.critical_pair else None
        cells = (str(pair.pair), f"{pair.wavelength_tokens:,.1f}", f"{pair.periods_in_training:,.3f}", at_target)
        table.add_row(*cells, style=style)
    console.print(table)
    say(
        f"Theoretical critical dimension: pair {inspection.critical_pair}. From there on, the "
        f"{total - inspection.critical_pair} slowest pairs turned less than once in training."
    )


def _stage(number: int, name: str) -> None:
    say()
    say(f"== {number}/6 {name}")
