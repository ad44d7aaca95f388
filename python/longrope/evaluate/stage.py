"""The evaluation stage: every method on the held-out documents, by position and by length, with intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

import longrope_kernels as lk

from ..context import Context
from ..progress import console, say, task
from ..search.budget import forward_cost
from ..team import Forward
from .bootstrap import paired_difference
from .measure import BASELINES, baseline
from .passkey import passkey
from .scoring import Scorer, block_tokens, bucket_tokens, mean_nll

OURS = "longrope"
MOST_BUCKETS = 8  # of positions, in tables and figures
DYNAMIC = "dynamic-ntk"  # NTK made anew for every length: at the target it is NTK
TITLES = {**BASELINES, OURS: "LongRoPE (ours)"}


def methods(context: Context, ours: lk.LongRope | None, dynamic: bool = False) -> dict[str, lk.LongRope]:
    """Return the ladders that are compared at the target, each as published; `ours` last, where there is one."""
    names = [name for name in BASELINES if dynamic or name != DYNAMIC]
    found = {name: baseline(context, name).at(context.target_length) for name in names}
    return found if ours is None else {**found, OURS: ours}


def position_edges(original: int, target: int) -> list[int]:
    """Return the edges of the buckets of positions, and of the lengths of texts, up to the target."""
    bucket = bucket_tokens(original)
    return [*range(0, target, bucket * math.ceil(target / bucket / MOST_BUCKETS)), target]


def text_lengths(original: int, target: int) -> list[int]:
    """Return the lengths of the table by length: those of the edges beyond the original, in whole blocks."""
    block = block_tokens(original)
    return [length for length in position_edges(original, target)[1:] if length > original and length % block == 0]


def run_evaluation(
    context: Context,
    ours: lk.LongRope | None,
    name: str = "heldout.json",
    what: str = "evaluate",
    dynamic: bool = False,
) -> dict[str, Any]:
    """Evaluate on the held-out documents, write the result and return it.

    Args:
        ours: the searched ladder; None evaluates the original model and the baselines alone.
        dynamic: dynamic NTK too, which takes a forward for each length of a text below the target.
    """
    loaded = context.loaded
    windows = context.split.heldout
    compared = methods(context, ours, dynamic)
    original, target = loaded.original_length, context.target_length
    short_methods = [method for method in ("original", OURS) if method in compared]
    depths = context.passkey_depths if ours is not None else ()
    passkey_methods = [method for method in ("original", "yarn", OURS) if depths and method in compared]
    total = len(windows) * (len(compared) * forward_cost(target) + len(short_methods) * forward_cost(original))
    total += len(depths) * len(passkey_methods) * forward_cost(target)
    shorter = [length for length in text_lengths(original, target) if length < target] if dynamic else []
    total += len(windows) * sum(map(forward_cost, shorter))
    anew = {length: baseline(context, DYNAMIC).at(length) for length in shorter}

    long: dict[str, list[dict[str, Any]]] = {method: [] for method in compared}
    short: dict[str, list[dict[str, Any]]] = {method: [] for method in short_methods}
    texts: dict[int, list[dict[str, Any]]] = {length: [] for length in shorter}
    keys: dict[str, list[dict[str, Any]]] = {}
    with task(what, total) as work:
        scorer = Scorer(loaded, context.run.evaluations, team=context.team)
        scorer.announce(
            Forward(window, compared[method], length, 0, {"stage": stage, "method": method})
            for window in windows
            for chosen, length, stage in ((compared, target, "heldout"), (short_methods, original, "heldout short"))
            for method in chosen
            if method != DYNAMIC
        )
        scorer.announce(
            Forward(window, rope, length, 0, {"stage": "heldout", "method": DYNAMIC})
            for window in windows
            for length, rope in anew.items()
        )
        label = ""
        scorer.on_new = lambda length, seconds: work.advance(forward_cost(length), label)
        scorer.on_known = lambda length: work.skip(forward_cost(length), label)
        for window in windows:
            for method, rope in compared.items():
                label = f"{TITLES[method]} on {window.name}"
                long[method].append(scorer.score(window, rope, target, stage="heldout", method=method))
            for method in short_methods:
                label = f"{TITLES[method]}, {original:,} tokens of {window.name}"
                record = scorer.score(window, compared[method], original, stage="heldout short", method=method)
                short[method].append(record)
            for length, rope in anew.items():
                label = f"{TITLES[DYNAMIC]}, {length:,} tokens of {window.name}"
                texts[length].append(scorer.score(window, rope, length, stage="heldout", method=DYNAMIC))
        for method in passkey_methods:
            keys[method] = passkey(
                loaded,
                context.run.evaluations,
                compared[method],
                target,
                depths,
                context.request.seed,
                on_new=lambda length, seconds: work.advance(forward_cost(length), "passkey"),
                method=method,
            )
    result = tabulate(context, compared, long, short, keys, texts)
    context.run.write_json(name, result)
    return result


def tabulate(
    context: Context,
    compared: Mapping[str, lk.LongRope],
    long: Mapping[str, Sequence[dict[str, Any]]],
    short: Mapping[str, Sequence[dict[str, Any]]],
    keys: Mapping[str, Sequence[dict[str, Any]]],
    texts: Mapping[int, Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Make the numbers of the report from the records.

    Args:
        texts: those of dynamic NTK at lengths below the target.
    """
    original, target = context.loaded.original_length, context.target_length
    block = block_tokens(original)
    edges, lengths = position_edges(original, target), text_lengths(original, target)
    titles, table = dict(TITLES), dict[str, Any]()
    if any(factor != 1 for factor in context.loaded.base.rescale_factors):
        titles["original"] = f"extended to {original:,}, not further"
    for method, rope in compared.items():
        records = long[method]
        table[method] = {
            "title": titles[method],
            "rope": rope.scalings[-1].to_dict(),
            "nll": mean_nll(records, original, target),
            "perplexity": math.exp(mean_nll(records, original, target)),
            "by_position": [
                {"first": first, "last": last, "nll": mean_nll(records, first, last)}
                for first, last in itertools.pairwise(edges)
            ],
            "by_document": [
                {"window": record["window"], "nll": mean_nll([record], original, target)} for record in records
            ],
            # A shorter text than the target is a prefix of it under the same regime, and attention is causal.
            "by_length": [
                {"length": n, "nll": mean_nll(texts.get(n, records) if method == DYNAMIC else records, 0, n)}
                for n in lengths
            ],
        }
        if method in short:
            table[method]["short"] = {
                "length": original,
                "nll": mean_nll(short[method], 0, original),
                "by_length": [
                    {"length": length, "nll": mean_nll(short[method], 0, length)}
                    for length in (original // 4, original // 2, original)
                    if length % block == 0
                ],
            }
    result: dict[str, Any] = {
        "format": "longrope-heldout/1",
        "original_length": original,
        "target_length": target,
        "bucket_tokens": edges[1],
        "windows": [window.describe() for window in context.split.heldout],
        "methods": table,
    }
    if OURS in compared:
        result["differences"] = {
            method: paired_difference(long[OURS], long[method], original, target).to_dict()
            for method in compared
            if method != OURS
        }
        pairs = list(zip(short[OURS], short["original"], strict=True))
        result["short_equals_original"] = all(a["nll_sha256"] == b["nll_sha256"] for a, b in pairs)
    if keys:
        result["passkey"] = {
            method: [{field: row[field] for field in ("depth", "retrieved", "expected", "guessed")} for row in rows]
            for method, rows in keys.items()
        }
    return result


def say_evaluation(result: dict[str, Any]) -> None:
    """Print the perplexity by position as a table, and the intervals."""
    original, target = result["original_length"], result["target_length"]
    say(f"Held-out perplexity by position, {len(result['windows'])} documents of {target:,} tokens")
    table = Table()
    table.add_column("method")
    buckets = next(iter(result["methods"].values()))["by_position"]
    for bucket in buckets:
        table.add_column(f"{bucket['first']:,}-", justify="right")
    table.add_column(f"{original:,}-{target:,}", justify="right", style="bold")
    for method in result["methods"].values():
        cells = [_number(math.exp(min(bucket["nll"], 700))) for bucket in method["by_position"]]
        table.add_row(method["title"], *cells, _number(method["perplexity"]))
    console.print(table)
    if DYNAMIC in result["methods"]:
        for method in ("ntk", DYNAMIC):
            shown = result["methods"][method]
            texts = [f"{one['length']:,}: {_number(math.exp(min(one['nll'], 700)))}" for one in shown["by_length"]]
            say(f"  perplexity of whole texts by length, {shown['title']}: {', '.join(texts)}")
    for method, difference in result.get("differences", {}).items():
        say(
            f"  loss of ours minus {result['methods'][method]['title']}: {difference['mean']:+.4f} nats "
            f"[{difference['low']:+.4f}, {difference['high']:+.4f}], perplexity x {difference['perplexity_ratio']:.3f}"
        )
    if "short_equals_original" in result:
        short = result["methods"][OURS]["short"]
        title = result["methods"]["original"]["title"]
        whose = "the original's" if title == TITLES["original"] else f"that of the model {title}"
        same = f"equal to {whose}, bit for bit" if result["short_equals_original"] else f"NOT {whose}"
        say(f"  up to {short['length']:,} tokens: perplexity {math.exp(short['nll']):.3f}, {same}")
    for method, rows in result.get("passkey", {}).items():
        marks = " ".join(f"{row['depth']:.2f}:{'yes' if row['retrieved'] else 'no'}" for row in rows)
        say(f"  passkey at {target:,} tokens, {TITLES[method]}, by depth: {marks}")


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
