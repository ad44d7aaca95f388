"""`python -m bench.readme`: write the benchmark section of the README from bench/results/.

What stands between the markers `<!-- bench -->` and `<!-- /bench -->` is replaced; figures come from nowhere else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from . import plots, record, tables

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def render(cpu: dict[str, Any] | None, ops: dict[str, Any] | None = None, figure: str | None = None) -> str:
    """Return the section as Markdown.

    Args:
        cpu, ops: records of `make bench-cpu` and `make bench`, at least one. What the first has, the second's
            rows are not shown for: then only RoPE alone.
        figure: address of the plot of time against tokens, as the README links it.
    """
    parts = [
        "Medians in one process; torch is its SDPA behind transformers' RoPE; a ratio is the peer's time over ours; "
        "the ceiling (bf16 pair products or fp32 multiply-adds on registers alone, or reads of memory) is measured "
        "beside each work. No time is reported where our result and a peer's differ beyond their dtype."
    ]
    if cpu is not None:
        parts += [f"`make bench-cpu`: {tables.provenance(cpu)}.", tables.comparisons(cpu).markdown()]
        if cost := tables.rotation_cost(cpu):
            parts.append(cost)
        if figure is not None:
            parts.append(f"![time against tokens]({figure})")
        if (grown := tables.growth(cpu)).rows:
            parts.append(grown.markdown())
        if lines := tables.refusals(cpu):
            parts.append("\n".join(f"- {line}" for line in lines))
    if ops is not None:
        shown = {**ops, "rows": [row for row in ops["rows"] if cpu is None or row["section"].startswith("rope")]}
        parts += [f"`make bench`: {tables.provenance(ops)}.", tables.brief(shown).markdown()]
        if lines := tables.refusals(shown):
            parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def replaced(text: str, section: str) -> str:
    """Return `text` with the section between the markers.

    Raises:
        ValueError: one line, where the two markers are not there once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: got {text.count(BEGIN)} {BEGIN} and {text.count(END)} {END}, expected one of each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Render and write, or say in one line why not."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md")
    parser.add_argument("--figure", type=Path, default=plots.FIGURE)
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.readme.read_text()
        figure = os.path.relpath(chosen.figure, chosen.readme.parent) if chosen.figure.is_file() else None
        found = {name: chosen.results / f"{name}.json" for name in ("cpu", "ops")}
        records = {name: record.read(path) for name, path in found.items() if path.is_file()}
        if not records:
            raise ValueError(f"--results: got {chosen.results} without cpu.json and ops.json, expected one of them")
        section = render(records.get("cpu"), records.get("ops"), figure)
        fresh = replaced(text, section)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    chosen.readme.write_text(fresh)
    print(f"{chosen.readme.name}: {section.count(chr(10)) + 1} lines between the markers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
