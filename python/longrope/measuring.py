"""From the options of `longrope measure` to an open run, methods and a plan; and the tables it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import longrope_kernels as lk

from . import factors as factor_files
from .context import Context
from .errors import refuse
from .evaluate import grids, harness, lengths, ruler
from .evaluate.measure import BASELINES, PERPLEXITY, RULER, SLIDING, TASKS, Method, Plan, baseline, factors_name
from .evaluate.stage import OURS, TITLES
from .inspection import inspect_rope
from .options import integers, numbers, open_run, refuse_searched_on
from .progress import console, say
from .report.measured import shown_differences, signed
from .run import read_run
from .search.stage import WINNER_FILE


def open_measurement(
    model: str,
    to: int | None,
    run_dir: Path | None,
    lengths: str | None,
    tasks: str,
    depths: str | None,
    samples: int,
    needles: int,
    stride: int,
    lm_eval: str | None,
    lm_eval_limit: int | None,
    seed: int,
    **options: Any,
) -> tuple[Context, Plan]:
    """Check the options and open the run directory, that of an earlier run included.

    Args:
        to: None: the run's target, or the longest length.
        options: of `options.open_run`.
    """
    asked = () if lengths is None else integers("--lengths", lengths)
    named = tuple(dict.fromkeys(tasks.split(","))) if tasks != "none" else ()
    known = (*TASKS, *ruler.TASKS)
    for one in named:
        if one not in known:
            refuse("--tasks", one or repr(tasks), f"{', '.join(known)}, separated by commas, or none")
    benchmarks = tuple(lm_eval.split(",")) if lm_eval else ()
    if not named and not benchmarks:
        refuse("--tasks", tasks, f"one or more of {', '.join(known)}, or --lm-eval")
    places = grids.DEPTHS if depths is None else numbers("--depths", depths)
    if not places or not all(0 <= depth <= 1 for depth in places) or len(set(places)) < len(places):
        refuse("--depths", depths, "one or more different numbers between 0 and 1")
    for option, value in (("--samples", samples), ("--lm-eval-limit", lm_eval_limit)):
        if value is not None and value < 1:
            refuse(option, value, "an int >= 1")
    if seed < 0:
        refuse("--seed", seed, "an int >= 0")
    harness.check(benchmarks)
    if to is None and run_dir is not None and (run_dir / "run.json").is_file():
        to = int(read_run(run_dir)["settings"]["to"])
    if to is None and not asked:
        refuse("--lengths", lengths or "nothing", "tokens, separated by commas; or --to")
    longest = max(asked) if to is None else to
    for length in asked:
        if not 2 <= length <= longest:
            refuse("--lengths", length, f"from 2 tokens to {longest}, the target (--to)")
    context, _ = open_run(model, longest, run_dir, keep_settings=True, extends=False, **options)
    chosen = asked or usual_lengths(context.original_length, longest)
    plan = Plan(tuple(sorted(set(chosen))), named, places, samples, needles, stride, benchmarks, lm_eval_limit, seed)
    if context.run.read_json("inspection.json") is None:
        loaded = context.loaded
        found = inspect_rope(loaded.rope, loaded.name, loaded.model.config.model_type, longest)
        context.run.write_json("inspection.json", found.to_dict())
    return context, plan


def usual_lengths(original: int, target: int) -> tuple[int, ...]:
    """Return half the original length, it, its doubles, and the target, as far as the target reaches.

    Examples:
        >>> usual_lengths(8192, 40000)
        (4096, 8192, 16384, 32768, 40000)
    """
    found, length = [], max(original // 2, 2)
    while length < target:
        found.append(length)
        length *= 2
    return (*found, target)


def chosen_methods(context: Context, method: str | None, factors: Path | None, plan: Plan) -> list[Method]:
    """Return the methods that were asked for; none named: a factor file, the run's winner, or the original model."""
    winner = context.run.path / WINNER_FILE
    names = list(dict.fromkeys(method.split(","))) if method is not None else []
    if method is None and factors is None:
        names = [OURS if winner.is_file() else "original"]
    found = []
    for name in names:
        if name == OURS:
            if not winner.is_file():
                refuse("--method", name, f"a run directory with {WINNER_FILE}, or --factors")
            found.append(_of_file(context, winner, plan, OURS, TITLES[OURS]))
        elif name not in BASELINES:
            refuse("--method", name or repr(method), f"{', '.join(BASELINES)} or {OURS}, separated by commas")
        elif name != "original" and context.target_length <= context.original_length:
            refuse("--to", context.target_length, f"more than the original length {context.original_length} for {name}")
        else:
            found.append(baseline(context, name))
    if factors is not None:
        found.append(_of_file(context, factors, plan))
    return found


def _of_file(context: Context, path: Path, plan: Plan, name: str | None = None, title: str | None = None) -> Method:
    """Return the ladder of a factor file, which must not have been searched on what it is measured on."""
    rope, content = factor_files.read(path, context.loaded.base)
    if {PERPLEXITY, SLIDING} & set(plan.tasks):
        refuse_searched_on(context, path, content)

    def at(length: int) -> lk.LongRope:
        return rope

    return Method(name or factors_name(rope), title or path.name, at)


def say_measured(results: Sequence[dict[str, Any]], plan: Plan) -> None:
    """Print a table of each task that was asked for: methods in rows, lengths in columns."""
    for section, title in (
        (PERPLEXITY, "Perplexity by length, non-overlapping windows [95% interval]"),
        (SLIDING, f"Perplexity by length, sliding windows, stride {plan.stride} [95% interval]"),
        (grids.PASSKEY, "Passkeys found, all depths [95% interval]"),
        (grids.MULTI_NEEDLE, f"All of {plan.needles} needles found, all depths [95% interval]"),
    ):
        if section in plan.tasks:
            cells = {
                one["title"]: {row["length"]: _cell(section, row) for row in one[section]["rows"]} for one in results
            }
            _table(title, "method", plan.lengths, cells)
            for one in results if section in (PERPLEXITY, SLIDING) else ():
                for other, minus in shown_differences(one, section, plan.lengths[-1]).items():
                    say(
                        f"  loss at {plan.lengths[-1]:,}, {one['title']} minus {BASELINES[other]}: {signed(minus)} nats"
                    )
    if plan.ruler_tasks:
        for one in results:
            cells = {name: {} for name in plan.ruler_tasks}
            for row in one[RULER]["rows"]:
                cells[row["task"]][row["length"]] = f"{row['score']:.0%}{_ends(row, '.0%')}  {row['nll']:.2f}"
            _table(f"RULER-like, {one['title']}: answers found [95% interval], loss", "task", plan.lengths, cells)
    for one in results if plan.lm_eval else ():
        for record in one["lm_eval"]:
            for name, metrics in record["results"].items():
                values = ", ".join(
                    f"{metric} {found['value']:.3f}{_ends(found, '.3f')}" for metric, found in metrics.items()
                )
                say(f"lm-eval {name}, {one['title']}: {values}")


def _cell(section: str, row: dict[str, Any]) -> str:
    if section in (PERPLEXITY, SLIDING):
        return f"{row['perplexity']:.3f}{_ends(row, '.3f', exponential=True)}"
    return f"{row['share']:.0%}{_ends(row, '.0%')}"


def _ends(row: dict[str, Any], form: str, exponential: bool = False) -> str:
    if row.get("low") is None:
        return ""
    low, high = (lengths.perplexity(row[end]) if exponential else row[end] for end in ("low", "high"))
    return f" [{low:{form}}, {high:{form}}]"


def _table(title: str, first: str, columns: Sequence[int], cells: dict[str, dict[int, str]]) -> None:
    say(title)
    table = Table()
    table.add_column(first)
    for length in columns:
        table.add_column(f"{length:,}", justify="right")
    for name, row in cells.items():
        table.add_row(name, *(row[length] for length in columns))
    console.print(table)
