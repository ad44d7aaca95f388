"""What each stage of the progressive extension is worth: `python -m bench.ablations`.

The tiny model is extended as `make demo-full` does, and again without one stage at a time; all read the same held-out
documents at every length under their own ladder. Prints perplexities and paired differences, and writes
bench/results/ablations.json and docs/figures/ablations.png. Stopped and started again, it goes on where it was.

    no search            YaRN's factors for the tuned lengths and the target; readjustment searches all the same
    no n-hat             all searches with n-hat 0
    no progressive step  as many tokens of training, all at the longer length
    no readjustment      the original factors up to the original length, those of the tuning beyond
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from longrope.context import versions
from longrope.evaluate.bootstrap import paired_difference
from longrope.evaluate.scoring import mean_nll
from longrope.options import open_extension
from longrope.presets import PRESETS
from longrope.progress import console, say
from longrope.progressive.by_length import lengths_between, score_lengths
from longrope.report import figures
from longrope.run import read_run, write_atomically

from . import record

TARGET = 32_768
FULL = "all stages"
NO_READJUSTMENT = "no readjustment"
COLORS = ("#3a9188", "#4f86c6", "#c58b2a", "#8a8f98")
FIGURE = record.ROOT / "docs/figures/ablations.png"


def variants() -> dict[str, dict[str, Any]]:
    """Return what each variant asks otherwise than the preset."""
    (short, first), (long, second) = PRESETS["tiny"].request["tune"]
    once = second + math.ceil(first * short / long)
    return {
        FULL: {},
        "no search": {"searched": False},
        "no n-hat": {"start_tokens": "0"},
        "no progressive step": {"tune": f"{long}:{once}"},
        NO_READJUSTMENT: {"readjust": "none"},
    }


def extend(name: str, changes: dict[str, Any], options: argparse.Namespace) -> dict[int, list[dict[str, Any]]]:
    """Extend the model and return the records of every held-out document at every length."""
    say(f"=== {name}")
    # Without readjustment, all stages before it are those of the whole run.
    folder = options.run if name in (FULL, NO_READJUSTMENT) else options.runs / name.replace(" ", "-")
    whole = {} if name == NO_READJUSTMENT else changes
    asked = read_run(folder).get("command") if (folder / "run.json").is_file() else None
    context, _, extension = open_extension(
        "tiny", model=options.model, to=TARGET, run_dir=folder, command=asked, **whole
    )
    assert extension is not None
    with closing(context):
        if name == NO_READJUSTMENT:
            extension.recipe = dataclasses.replace(extension.recipe, readjust=())
        tuned, ladder = extension.build()
        context.release()
        lengths = lengths_between(extension.recipe.original, TARGET)
        with extension.open("result", str(tuned), TARGET) as result:
            return dict(score_lengths(result, {name: ladder}, lengths)[name])


def summary(found: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return perplexities, and what each variant loses against all stages, by length."""
    rows: dict[str, Any] = {}
    for name, by_length in found.items():
        rows[name] = [
            {
                "length": length,
                "perplexity": math.exp(mean_nll(records, 0, length)),
                **paired_difference(records, found[FULL][length], 0, length).to_dict(),
            }
            for length, records in by_length.items()
        ]
    return {
        "format": "longrope-ablations/1",
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": record.commit(),
        "machine": record.machine(),
        "versions": versions(),
        "variants": rows,
    }


def say_summary(result: dict[str, Any]) -> None:
    """Print the table: perplexity, and nats lost against all stages with the 95% interval."""
    table = Table()
    table.add_column("variant")
    for row in result["variants"][FULL]:
        table.add_column(f"{row['length']:,}", justify="right")
    for name, rows in result["variants"].items():
        table.add_row(name, *(f"{row['perplexity']:.2f}" for row in rows))
    console.print(table)
    for name, rows in result["variants"].items():
        if name != FULL:
            cells = (f"{row['length']:,}: {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in rows)
            say(f"  {name} minus {FULL}, nats: {', '.join(cells)}")


def figure(result: dict[str, Any]) -> Figure:
    """Draw what each variant loses, with its intervals."""
    with figures.axes(height=3.8) as (drawing, ax):
        ax.axhline(0, color=figures.COLORS["longrope"], linewidth=1.4)
        names = [name for name in result["variants"] if name != FULL]
        for number, (name, color) in enumerate(zip(names, COLORS, strict=True)):
            rows = result["variants"][name]
            at = [row["length"] * 2 ** (0.06 * (number - len(names) / 2)) for row in rows]
            means = [row["mean"] for row in rows]
            errors = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
            ax.errorbar(at, means, errors, color=color, label=name, marker="o", markersize=4, capsize=2)
        ax.set_xscale("log", base=2)
        ax.set_xticks([row["length"] for row in result["variants"][FULL]])
        figures.thousands(ax)
        ax.set(xlabel="length, tokens", ylabel="nats per token", title="What is lost without one stage")
        ax.legend(fontsize=9)
        return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny-512")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="the whole run: what `make demo-full` made")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where the others are made")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    found = {name: extend(name, changes, options) for name, changes in variants().items()}
    result = summary(found)
    say_summary(result)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "ablations.json").write_text(json.dumps(result, indent=1) + "\n")
    write_atomically(FIGURE, figures.png(figure(result)))


if __name__ == "__main__":
    main()
