"""The report's part on what `longrope measure` found, from `measured/*.json`; nothing where there are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from matplotlib.figure import Figure

from ..evaluate.lengths import perplexity
from ..evaluate.measure import BASELINES
from . import heatmaps
from .files import OURS, Report
from .markup import as_number, figure, table

WINDOWS = {
    "perplexity": (
        "Perplexity by length, non-overlapping windows",
        "The held-out texts are cut into windows of each length, one after the other, and every token of a window is "
        "scored, the early ones with next to nothing before them.",
    ),
    "sliding": (
        "Perplexity by length, sliding windows",
        "The window moves by {stride:,} tokens, and only the new tokens are scored, each with nearly a whole window "
        "before it (Press et al. 2021); the first window scores all its tokens.",
    ),
}
GRIDS = {
    "passkey": "A number is hidden at a depth of a repeated filler text and asked for at its end.",
    "multi-needle": "{needles} numbers are hidden, the first at the depth, the others from there to the end; counted "
    "where all are found.",
}


def drawings(report: Report) -> dict[str, Callable[[], Figure]]:
    """Return the figures that can be drawn, by name."""
    every = list(report.measured.values())
    made: dict[str, Callable[[], Figure]] = {}
    for section, (title, _) in WINDOWS.items():
        if having := [one for one in every if section in one]:
            made[f"{section}_by_length"] = partial(heatmaps.by_length, having, section, title)
    for section in GRIDS:
        for one in every:
            if section in one:
                made[f"{section}_{one['method']}"] = partial(heatmaps.retrieval, one, section)
    return made


def measured_sections(report: Report, drawn: dict[str, str]) -> str:
    every = list(report.measured.values())
    parts = [windows(every, section, drawn) for section in WINDOWS]
    parts += [grid(every, section, drawn) for section in GRIDS]
    return "\n".join(part for part in (*parts, ruler(every), benchmarks(every)) if part)


def windows(every: list[dict[str, Any]], section: str, drawn: dict[str, str]) -> str:
    having = [one for one in every if section in one]
    if not having:
        return ""
    title, text = WINDOWS[section]
    lengths = sorted({row["length"] for one in having for row in one[section]["rows"]})
    cells = []
    for one in having:
        rows = {row["length"]: row for row in one[section]["rows"]}
        cells.append((one["method"] == OURS, [one["title"], *(_perplexity(rows.get(length)) for length in lengths)]))
        late = [rows.get(length, {}).get("full_context") for length in lengths]
        if any(nll is not None for nll in late):
            said = ["" if nll is None else as_number(perplexity(nll)) for nll in late]
            cells.append((False, [f"{one['title']}, without the first windows", *said]))
    differences = []
    for one in having:
        rows = {row["length"]: shown_differences(one, section, row["length"]) for row in one[section]["rows"]}
        for other in dict.fromkeys(name for row in rows.values() for name in row):
            minus = [signed(row[other]) if other in row else "" for row in (rows.get(length, {}) for length in lengths)]
            differences.append((one["method"] == OURS, [f"{one['title']} - {BASELINES[other]}", *minus]))
    documents = ", ".join(escape(text["document"]) for text in having[0][section]["documents"])
    return (
        f"<h2>{title}</h2><p>{text.format(**having[0][section])} Every window is a forward of its own, under the "
        f"regime of its length. Documents: {documents}.</p>"
        + figure(drawn.get(f"{section}_by_length"), "Shaded: 95% bootstrap interval over blocks of tokens.")
        + table(["tokens of a window", *(f"{length:,}" for length in lengths)], cells)
        + (table(["loss, nats", *(f"{length:,}" for length in lengths)], differences) if differences else "")
    )


def shown_differences(one: dict[str, Any], section: str, length: int) -> dict[str, dict[str, Any]]:
    """Return the differences in loss that are worth a line: of a baseline from the original, of ours from each."""
    row: dict[str, Any] = next((row for row in one[section]["rows"] if row["length"] == length), {})
    minus: dict[str, dict[str, Any]] = row.get("minus", {})
    return {name: found for name, found in minus.items() if name == "original" or one["method"] not in BASELINES}


def signed(minus: dict[str, Any]) -> str:
    """Write a difference with its interval."""
    ends = "" if minus["low"] is None else f" [{minus['low']:+.4f}, {minus['high']:+.4f}]"
    return f"{minus['mean']:+.4f}{ends}"


def grid(every: list[dict[str, Any]], section: str, drawn: dict[str, str]) -> str:
    having = [one for one in every if section in one]
    if not having:
        return ""
    title = "Passkeys by length and depth" if section == "passkey" else "Several needles by length and depth"
    parts = [
        f"<h2>{title}</h2><p>{GRIDS[section].format(**having[0][section])} Found where every token of the answer is "
        "the likeliest. In a cell: how often, and the mean loss of the answers' tokens in nats. Intervals are "
        "Wilson's, over all depths of a length.</p>"
    ]
    parts += [figure(drawn.get(f"{section}_{one['method']}"), escape(one["title"])) for one in having]
    lengths = sorted({row["length"] for one in having for row in one[section]["rows"]})
    cells = []
    for one in having:
        rows = {row["length"]: row for row in one[section]["rows"]}
        cells.append((one["method"] == OURS, [one["title"], *(_share(rows.get(length)) for length in lengths)]))
    parts.append(table(["tokens", *(f"{length:,}" for length in lengths)], cells))
    return "\n".join(parts)


def ruler(every: list[dict[str, Any]]) -> str:
    having = [one for one in every if "ruler" in one]
    if not having:
        return ""
    parts = [
        "<h2>RULER-like tasks</h2><p>After Hsieh et al. 2024, with texts of our own: not to be compared with published "
        "scores. The share of answers found, its 95% bootstrap interval over samples, and the loss of the answers' "
        "tokens in nats.</p>"
    ]
    for one in having:
        lengths = sorted({row["length"] for row in one["ruler"]["rows"]})
        rows = {(row["task"], row["length"]): row for row in one["ruler"]["rows"]}
        cells = [
            (False, [name, *(_ruler(rows.get((name, length))) for length in lengths)])
            for name in dict.fromkeys(row["task"] for row in one["ruler"]["rows"])
        ]
        parts.append(table([one["title"], *(f"{length:,}" for length in lengths)], cells))
    return "\n".join(parts)


def benchmarks(every: list[dict[str, Any]]) -> str:
    cells = []
    for one in every:
        for record in one.get("lm_eval", []):
            for name, metrics in record["results"].items():
                for metric, found in metrics.items():
                    ends = "" if found.get("low") is None else f"{found['low']:.3f} to {found['high']:.3f}"
                    count = str(found.get("samples", ""))
                    cells.append(
                        (one["method"] == OURS, [one["title"], name, metric, f"{found['value']:.3f}", ends, count])
                    )
    if not cells:
        return ""
    return "<h2>Short benchmarks, by lm-eval</h2>" + table(
        ["method", "task", "metric", "value", "95% interval", "samples"], cells
    )


def _perplexity(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ends = "" if row["low"] is None else f" [{as_number(perplexity(row['low']))}, {as_number(perplexity(row['high']))}]"
    return as_number(row["perplexity"]) + ends


def _share(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['share']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


def _ruler(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ends = "" if row["low"] is None else f" [{row['low']:.0%}, {row['high']:.0%}]"
    return f"{row['score']:.0%}{ends} {row['nll']:.2f}"
