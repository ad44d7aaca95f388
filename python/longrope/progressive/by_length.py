"""Perplexity by length: every length read under the regime the ladder gives it, beside methods with one for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

import longrope_kernels as lk

from ..context import Context
from ..evaluate.bootstrap import paired_difference
from ..evaluate.measure import baseline
from ..evaluate.scoring import Scorer, mean_nll
from ..evaluate.stage import DYNAMIC, OURS, TITLES, methods
from ..progress import console, say, task
from ..search.budget import forward_cost
from ..team import Forward

FORMAT = "longrope-lengths/1"
ORIGINAL, STAGE = "original", "by length"


def lengths_between(shortest: int, longest: int) -> list[int]:
    """Return `shortest`, twice that, and so on, and `longest`.

    Examples:
        >>> lengths_between(512, 3000)
        [512, 1024, 2048, 3000]
    """
    doubled = itertools.takewhile(lambda length: length < longest, (shortest << step for step in itertools.count()))
    return [*doubled, longest]


def score_lengths(context: Context, ropes: Mapping[str, lk.LongRope], lengths: Sequence[int]) -> dict[str, Any]:
    """Return the records of every method at every length, `{method: {length: [record of each held-out document]}}`.

    A text is read to a length in a forward of its own where the regime changes with the length; under one regime for
    all it is the beginning of a longer forward, since attention is causal.
    """
    windows, longest = context.split.heldout, max(lengths)
    scorer = Scorer(context.loaded, context.run.evaluations, team=context.team)
    jobs = []
    for method, rope in ropes.items():
        for length in lengths:
            own = rope.select(length) != rope.select(longest)
            jobs += [(method, rope, length, length if own else longest, window) for window in windows]
    found: dict[str, Any] = {method: {length: [] for length in lengths} for method in ropes}
    known: dict[tuple[str, int, str], Any] = {}
    with task(
        "by length", sum(forward_cost(read) for read in {(m, r, w.name): r for m, _, _, r, w in jobs}.values())
    ) as work:
        scorer.on_new = lambda length, seconds: work.advance(forward_cost(length))
        scorer.on_known = lambda length: work.skip(forward_cost(length))
        scorer.announce(
            Forward(window, rope, read, 0, {"stage": STAGE, "method": method}) for method, rope, _, read, window in jobs
        )
        for method, rope, length, read, window in jobs:
            key = (method, read, window.name)
            if key not in known:
                known[key] = scorer.score(window, rope, read, stage=STAGE, method=method)
            found[method][length].append(known[key])
    return found


def published(context: Context, lengths: Sequence[int]) -> dict[str, lk.LongRope]:
    """Return the original as it is, PI, NTK and YaRN with one regime for all lengths, and dynamic NTK."""
    target, original = context.target_length, context.original_length
    found = {
        name: rope if name == ORIGINAL else lk.LongRope(original, {target: rope.scalings[-1]})
        for name, rope in methods(context, None).items()
    }
    dynamic = baseline(context, DYNAMIC)
    return {**found, DYNAMIC: lk.LongRope(original, {n: dynamic.at(n).select(n) for n in lengths})}


def tabulate(records: Mapping[str, Mapping[int, list[dict[str, Any]]]], lengths: Sequence[int]) -> dict[str, Any]:
    """Return mean losses over whole texts by length, and the paired differences of ours to the others."""
    table = {
        method: {
            "title": TITLES.get(method, method),
            "by_length": [{"length": n, "nll": mean_nll(by_length[n], 0, n)} for n in lengths],
        }
        for method, by_length in records.items()
    }
    result: dict[str, Any] = {"format": FORMAT, "lengths": list(lengths), "methods": table}
    if OURS in records:
        result["differences"] = {
            method: [
                {"length": n, **paired_difference(records[OURS][n], by_length[n], 0, n).to_dict()} for n in lengths
            ]
            for method, by_length in records.items()
            if method != OURS
        }
    return result


def say_lengths(result: Mapping[str, Any]) -> None:
    """Print the table, and how ours compares at every length."""
    say("Held-out perplexity of whole texts, by length")
    table = Table()
    table.add_column("method")
    for length in result["lengths"]:
        table.add_column(f"{length:,}", justify="right")
    for method in result["methods"].values():
        values = [math.exp(min(entry["nll"], 700)) for entry in method["by_length"]]
        table.add_row(method["title"], *(f"{value:.2f}" if value < 100 else f"{value:,.0f}" for value in values))
    console.print(table)
    for method, differences in result.get("differences", {}).items():
        shown = ", ".join(f"{d['length']:,}: {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in differences)
        say(f"  ours minus {TITLES.get(method, method)}, nats: {shown}")
