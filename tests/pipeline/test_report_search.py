"""What the report says of searches beside the first kind, LongRoPE2's and readjustments, and of older runs."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from longrope.report import write_report
from longrope.report.figures import OTHERS, factors, search_curve, seed_colors

RESULTS = Path(__file__).parents[2] / "bench/results"


class Text(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.parts).split())


@pytest.fixture
def copied(extended: Run, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("export", "figures", "report.html")
    return Path(shutil.copytree(extended.folder, tmp_path / "run", ignore=ignored))


def as_longrope2(folder: Path) -> dict[str, Any]:
    """Make the run's search one of LongRoPE2, with a seed more and a critical pair found at 5."""
    search = json.loads((folder / "search.json").read_text())
    search |= {"method": "LongRoPE2", "objective": "needle"}
    search["space"] |= {"kind": "critical", "critical_pairs": [3, 4, 5, 6, 7]}
    search["winner"]["candidate"]["critical_pair"] = 5
    search["history"].insert(3, {**search["history"][0], "origin": "seed critical pair 7", "id": "0" * 16})
    (folder / "search.json").write_text(json.dumps(search))
    return search


def test_longrope2_is_named_with_its_objective_and_both_critical_pairs(copied: Path) -> None:
    as_longrope2(copied)
    text = str(Text(write_report(copied).read_text()))
    assert "Method: LongRoPE2. Minimised: the loss of answers" in text
    assert "Critical pair found: 5; the theoretical one is 7." in text
    assert "Critical pair from 3 to 7, factors from it on in [1, 2.5] in steps of 0.01" in text


def test_the_factors_are_drawn_against_both_critical_pairs(copied: Path) -> None:
    inspection = json.loads((copied / "inspection.json").read_text())
    plain = json.loads((copied / "search.json").read_text())
    search = as_longrope2(copied)
    for one, lines in ((plain, {6.5}), (search, {4.5, 6.5})):
        (ax,) = factors(one, inspection).axes
        drawn = {line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1}
        assert drawn == lines
    assert "critical pair found: 5 →" in [text.get_text() for text in factors(search, inspection).axes[0].texts]


def test_a_seed_of_any_name_is_drawn(copied: Path) -> None:
    search = as_longrope2(copied)
    colors = seed_colors(search)
    assert (len(colors), colors[3]) == (4, OTHERS[0])
    assert len(set(colors)) == 4
    (ax,) = search_curve(search).axes
    assert any(label.startswith("seed critical pair 7, ") for label in ax.get_legend_handles_labels()[1])


def test_a_first_search_says_what_it_always_said(copied: Path) -> None:
    text = str(Text(write_report(copied).read_text()))
    assert "Method: LongRoPE. Minimised: mean loss over positions 128 to 256 of the search documents." in text
    assert "Critical pair found" not in text
    assert "Readjusted for short texts" not in text


def test_readjustments_are_listed_by_length(copied: Path) -> None:
    losses = {"original": 3.0, "extended": 2.0, "readjusted": 1.0}
    interval = {"mean": -1.0, "low": -1.5, "high": -0.5}
    lengths = [
        {
            "length": length,
            "origin": "seed blend 0.5",
            "largest_factor": 2.5,
            "search": losses,
            "heldout": {name: loss + length / 1000 for name, loss in losses.items()},
            "differences": {"original": interval, "extended": interval},
        }
        for length in (64, 100)
    ]
    (copied / "readjust.json").write_text(json.dumps({"lengths": lengths}))
    text = str(Text(write_report(copied).read_text()))
    assert "64 3.0000 2.0000 1.0000 3.0640 2.0640 1.0640 -1.0000 [-1.5000, -0.5000]" in text
    assert "100 3.0000 2.0000 1.0000 3.1000 2.1000 1.1000" in text


@pytest.mark.parametrize("name", ["search_full", "demo"])
def test_runs_in_the_repository_from_before_there_were_methods_are_reported(name: str, tmp_path: Path) -> None:
    kept = RESULTS / name
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    if not (folder / "inspection.json").is_file():  # the demo's is not kept; any run's of the same model serves
        shutil.copy(RESULTS / "search_full" / "inspection.json", folder)
    text = str(Text(write_report(folder).read_text()))
    search = json.loads((kept / "search.json").read_text())
    assert f"Minimised: mean loss over positions {search['score_from']:,} to {search['target_length']:,}" in text
    assert f"{search['winner']['score']:.4f}" in text
