"""`report.html`: one file, no network, made from the files of a run directory alone."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import refuse
from ..evaluate.measure import BASELINES as MEASURED
from ..evaluate.measure import FOLDER
from ..evaluate.measure import FORMAT as MEASURED_FORMAT
from ..run import FORMAT, read_json, write_atomically
from . import figures, measured, progressive
from .files import OURS, Report
from .methods import (
    documents_section,
    export_section,
    factor_section,
    inspection_section,
    readjusted_section,
    repeat_section,
    search_section,
)
from .results import headline, intervals, passkeys, perplexity, short_text


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run directory, from whatever stages have left there.

    Raises:
        UsageError: not a run directory, or nothing in it yet.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        refuse("RUN", folder, "a run directory, with a run.json")
    report = read_report(folder)
    if report.inspection is None:
        refuse("RUN", folder, "a run directory with at least an inspection.json (run: longrope extend)")
    drawn: dict[str, str] = {}
    also_svg = measured.drawings(report)
    for name, make in drawings(report).items():
        figure = make()
        if figure is not None:
            write_atomically(folder / "figures" / f"{name}.png", figures.png(figure))
            drawn[name] = figures.svg(figure)
            if name in also_svg:
                write_atomically(folder / "figures" / f"{name}.svg", drawn[name].encode())
    style = Path(__file__).with_name("style.css").read_text()
    page = folder / "report.html"
    write_atomically(page, document(report, drawn, style).encode())
    return page


def read_report(folder: Path) -> Report:
    """Read what the stages have left."""

    def read(name: str) -> Any:
        return read_json(folder / name) if (folder / name).is_file() else None

    run = read("run.json")
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        refuse("RUN", folder / "run.json", f"a run.json of format {FORMAT!r}")
    return Report(
        run,
        read("inspection.json"),
        read("documents.json"),
        read("search.json"),
        read("heldout.json") or read("baselines.json"),
        read("export.json"),
        plan := read("plan.json"),
        read("lengths.json"),
        read("ladder.json"),
        tuning_stages(folder, plan),
        read_measured(folder),
        read("readjust.json") or read("stages/readjust/readjust.json"),
    )


def tuning_stages(folder: Path, plan: Any) -> tuple[dict[str, Any], ...]:
    """Read what the fine-tuning stages of a progressive extension have left, in their order."""
    stages = plan["stages"] if plan else ()
    files = [folder / "stages" / stage["name"] / "tune.json" for stage in stages if stage["kind"] == "tune"]
    return tuple(read_json(file) for file in files if file.is_file())


def read_measured(folder: Path) -> dict[str, Any]:
    """Return what `longrope measure` has left, by method: baselines in the order of their strength, ours last."""
    order = (*MEASURED, OURS)
    found = {}
    for file in sorted((folder / FOLDER).glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or content.get("format") != MEASURED_FORMAT:
            refuse("RUN", file, f"a file of format {MEASURED_FORMAT!r}")
        found[content["method"]] = content
    return dict(sorted(found.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))


def drawings(report: Report) -> dict[str, Callable[[], Figure | None]]:
    """Return the figures that can be drawn, by name."""
    made: dict[str, Callable[[], Figure | None]] = {}
    inspection, search, heldout = report.inspection, report.search, report.heldout
    if inspection is not None:
        made["wavelengths"] = lambda: figures.wavelengths(inspection)
    if search is not None and inspection is not None:
        made["factors"] = lambda: figures.factors(search, inspection)
        made["search"] = lambda: figures.search_curve(search)
        made["screens"] = lambda: figures.screens(search)
    if heldout is not None:
        made["perplexity_by_position"] = lambda: figures.by_position(heldout)
    if (lengths := report.lengths) is not None:
        made["lengths"] = lambda: progressive.by_length(lengths)
    if (ladder := report.ladder) is not None:
        made["ladder"] = lambda: progressive.ladder(ladder)
    made["tuning"] = lambda: progressive.tuning(list(report.tuning))
    return {**made, **measured.drawings(report)}


def document(report: Report, drawn: dict[str, str], style: str) -> str:
    """Return the whole page."""
    settings = report.settings
    original = (report.inspection or {}).get("original_length", 0)
    title = f"{settings['model']}: {original:,} to {settings['to']:,} tokens"
    if report.search is None and report.heldout is None and report.measured:
        title = f"{settings['model']}, trained to {original:,} tokens, measured"
    parts = [
        progressive.headline(report, title) if report.plan else headline(report, title),
        progressive.lengths_section(report, drawn),
        progressive.stages_section(report, drawn),
        progressive.ladder_section(report, drawn),
        perplexity(report, drawn),
        intervals(report),
        "" if report.plan else short_text(report),
        passkeys(report),
        measured.measured_sections(report, drawn),
        factor_section(report, drawn),
        search_section(report, drawn),
        readjusted_section(report),
        inspection_section(report, drawn),
        export_section(report),
        documents_section(report),
        repeat_section(report),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written by <code>longrope</code> {escape(report.run['versions']['longrope_kernels'])}. "
        f"Every figure on this page comes from the files beside it.</footer>\n</main>\n</body>\n</html>\n"
    )
