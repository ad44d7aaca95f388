"""Rows of a record as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .workloads import COMPILED, LLAMA, LLAMA_UNFUSED, ONE_THREAD, OURS, OURS_BF16, OURS_FP16, PACKED, TORCH, UNROTATED

BESIDE = {
    TORCH: "torch",
    PACKED: "torch, heads packed",
    OURS_BF16: "ours, bf16 cache",
    ONE_THREAD: "ours, one thread",
    OURS_FP16: "ours, fp16",
    LLAMA: "llama.cpp, flash attention",
    LLAMA_UNFUSED: "llama.cpp, without it",
}
SECTION_TITLES = {
    "prefill": "prefill",
    "training": "fwd + bwd",
    "decode": "decode",
    "llama.cpp": "prefill",
    "threads": "prefill",
    "model": "whole model",
    "rope": "RoPE",
    "rope backward": "RoPE, fwd + bwd",
}


@dataclass(frozen=True)
class Table:
    """Headings and cells; the first column is aligned left, the others right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        align = ["---", *["---:"] * (len(self.headings) - 1)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.headings, align, *self.rows))

    def show(self, console: Console, title: str = "") -> None:
        if not self.rows:
            return
        table = RichTable(title=title or None, title_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
        for cells in self.rows:
            table.add_row(*cells)
        console.print(table)


def duration(seconds: float | None) -> str:
    """Format a time with three digits.

    Examples:
        >>> duration(0.01234), duration(2.5)
        ('12.3 ms', '2.50 s')
    """
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f} ms"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def comparisons(content: dict[str, Any]) -> Table:
    """One line per work and peer, growth left out: times, ratios, share of the main ceiling."""
    rows = []
    for row in _measured(content):
        seconds, ratios = row["seconds"], row["ratios"]
        beside = [] if row["section"] == "growth" else [side for side in BESIDE if side in seconds]
        for side in beside:
            cells = [label(row), duration(seconds[OURS]), BESIDE[side], duration(seconds[side]), times(ratios[side])]
            first = side == beside[0]
            compiled, share = (ratios.get(COMPILED), main_share(row)) if first else (None, None)
            rows.append([*cells, times(compiled), percent(share)])
    return Table(["work", "ours", "beside", "its time", "ratio", "to torch.compile", "of ceiling"], rows)


def brief(content: dict[str, Any]) -> Table:
    """One line per work of `make bench`: times and the ratio to torch."""
    rows = []
    for row in _measured(content):
        seconds, ratios = row["seconds"], row["ratios"]
        cells = [label(row), duration(seconds[OURS]), duration(seconds.get(TORCH)), times(ratios.get(TORCH))]
        rows.append([*cells, times(ratios.get(PACKED))])
    return Table(["work", "ours", "torch", "ratio", "to torch, heads packed"], rows)


def ceilings(content: dict[str, Any]) -> Table:
    """Rates, every ceiling and the share of it, and the largest difference of a peer's result from ours."""
    rows = []
    for row in _measured(content):
        found = row["ceilings"]
        if not found or row["section"] == "growth":
            continue
        main = next(iter(found))
        other = next((name for name in found if name != main), None)
        cells = [
            label(row),
            f"{row['rate']:.0f} {row['unit']}",
            f"{found[main]:.0f} ({main})",
            percent(main_share(row)),
        ]
        cells += ["-", "-"] if other is None else [f"{found[other]:.0f} ({other})", percent(row["shares"].get(other))]
        rows.append([*cells, f"{max(row['differences'].values(), default=0.0):.1g}"])
    return Table(["work", "rate", "ceiling", "share", "beside", "share", "difference"], rows)


def main_share(row: dict[str, Any]) -> float | None:
    """Return the share of the first ceiling, the one that binds the work."""
    return row["shares"].get(next(iter(row["ceilings"]), ""))


def growth(content: dict[str, Any]) -> Table:
    """Time by the number of tokens, and what each doubling multiplies it by."""
    rows, before = [], None
    for row in (row for row in _measured(content) if row["section"] == "growth"):
        ours, torch_seconds = row["seconds"][OURS], row["seconds"].get(TORCH)
        step = f"{ours / before:.1f}x" if before else "-"
        cells = [f"{row['shape']['tokens']:,}", duration(ours), step, duration(torch_seconds)]
        rows.append([*cells, times(row["ratios"].get(TORCH)), percent(main_share(row))])
        before = ours
    return Table(["tokens", "ours", "to the line above", "torch", "ratio", "of ceiling"], rows)


def goals(content: dict[str, Any]) -> Table:
    """What was to be reached, and what was."""
    rows = []
    for row in _measured(content):
        for what, wanted in row["goals"].items():
            found = main_share(row) if what == "share" else row["ratios"].get(what)
            form: Callable[[float | None], str] = percent if what == "share" else times
            name = {"share": "of ceiling", UNROTATED: "unrotated / rotated"}.get(what, f"to {what}")
            verdict = "-" if found is None else "yes" if found >= wanted else "no"
            rows.append([label(row), name, form(wanted), form(found), verdict])
    return Table(["work", "figure", "wanted", "measured", "reached"], rows)


def label(row: dict[str, Any]) -> str:
    """Say what a row measured."""
    title = SECTION_TITLES.get(row["section"], row["section"])
    return f"{title}: {row['name']}"


def refusals(content: dict[str, Any]) -> list[str]:
    """One line for each work that was not reported, and for each side that is missing."""
    lines = [f"not reported: {label(row)}: {row['refused']}" for row in content["rows"] if "refused" in row]
    missing = {f"{side}: {reason}" for row in _measured(content) for side, reason in row["notes"].items()}
    return lines + sorted(missing) + [f"{name}: {note}" for name, note in content["notes"].items()]


def provenance(content: dict[str, Any]) -> str:
    """One line: the machine, the versions and the commit."""
    found, versions = content["machine"], content["versions"]
    family = f" (family {found['family']}, model {found['model']})" if "family" in found and "model" in found else ""
    modified = " with changes" if content["modified"] else ""
    return (
        f"{found['processor']}{family}, {content['threads']} threads, {found['instruction_set']}; "
        f"torch {versions['torch']}, transformers {versions.get('transformers', '-')}; "
        f"{content['date'][:10]}, commit {(content['commit'] or 'unknown')[:10]}{modified}"
    )


def rotation_cost(content: dict[str, Any]) -> str | None:
    """Say how much longer prefill takes with rotation than without, or None where it was not measured."""
    costs = [1 / row["ratios"][UNROTATED] for row in _measured(content) if UNROTATED in row["ratios"]]
    if not costs:
        return None
    return f"Prefill with rotation takes {min(costs):.3f} to {max(costs):.3f} times what it takes without."


def _measured(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if "refused" not in row]
