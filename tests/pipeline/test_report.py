"""`report.html`: one file, no network, and the numbers of the run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Run

from longrope.report import write_report
from longrope.report.markup import as_number, as_perplexity

FETCHING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what a browser would fetch, the text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetches: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetches += [value for name, value in attrs if name in FETCHING and value and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(extended: Run) -> str:
    return (extended.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def text(page: Page) -> str:
    return " ".join(" ".join(page.text).split())


def read(run: Run, name: str) -> Any:
    return json.loads((run.folder / name).read_text())


def test_it_fetches_nothing(page: Page, html: str) -> None:
    assert page.fetches == []
    assert not {"script", "iframe", "object", "embed", "link"} & set(page.tags)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    assert not [found for found in re.findall(r"https?://[^\s\"'<)]+", html) if "www.w3.org" not in found]


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


def test_it_shows_the_five_figures(page: Page, extended: Run) -> None:
    assert page.tags.count("svg") == 5
    names = {"factors", "perplexity_by_position", "screens", "search", "wavelengths"}
    assert {file.stem for file in (extended.folder / "figures").iterdir()} == names


def test_the_run_in_the_repository_can_still_be_reported(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "bench/results/search_full"
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    (folder / "report.html").unlink()
    assert write_report(folder).read_text().startswith("<!doctype html>")
    assert {file.name for file in (folder / "figures").iterdir()} == {
        file.name for file in (kept / "figures").iterdir()
    }


def test_it_has_the_perplexity_of_every_method_by_position(text: str, extended: Run) -> None:
    for method in read(extended, "heldout.json")["methods"].values():
        assert method["title"] in text
        assert as_number(method["perplexity"]) in text
        for bucket in method["by_position"]:
            assert as_perplexity(bucket["nll"]) in text


def test_it_has_the_intervals_and_what_they_are(text: str, extended: Run) -> None:
    for difference in read(extended, "heldout.json")["differences"].values():
        for end in ("mean", "low", "high"):
            assert f"{difference[end]:+.4f}" in text
    assert "Paired bootstrap" in text


def test_it_says_whether_the_winner_is_a_seed(text: str, extended: Run) -> None:
    search = read(extended, "search.json")
    assert ("is a seed" in text) == search["winner_is_a_seed"]
    assert ("was found" in text) != search["winner_is_a_seed"]


def test_it_has_the_factors_the_documents_and_how_to_repeat_it(text: str, extended: Run) -> None:
    winner = read(extended, "factors/winner.json")
    assert ", ".join(f"{round(factor, 4):g}" for factor in winner["rescale_factors"]) in text
    for side in read(extended, "documents.json").values():
        for window in side:
            assert window["sha256"] in text
    assert read(extended, "run.json")["command"] in text
    assert read(extended, "run.json")["command"] == shlex.join(["longrope", *extended.arguments])


def test_the_same_files_give_the_same_page(extended: Run, tmp_path: Path, html: str) -> None:
    shutil.copytree(extended.folder, tmp_path / "run", ignore=shutil.ignore_patterns("export", "report.html"))
    first = write_report(tmp_path / "run").read_text()
    assert write_report(tmp_path / "run").read_text() == first
    assert Page(first).text == Page(html).text


@pytest.mark.parametrize(
    "missing", [("heldout.json", "export.json"), ("search.json", "heldout.json", "export.json", "documents.json")]
)
def test_stages_that_have_not_run_are_left_out(extended: Run, tmp_path: Path, missing: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(extended.folder, folder, ignore=shutil.ignore_patterns("export", "figures", *missing))
    made = Page(write_report(folder).read_text())
    assert made.open == []
    assert ("The search" in made.text) == ("search.json" not in missing)
    assert "Differences in loss, with intervals" not in made.text


def test_names_are_escaped(extended: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(extended.folder, folder, ignore=shutil.ignore_patterns("export", "figures"))
    for name in ("run.json", "documents.json"):
        text = (folder / name).read_text().replace("text0.txt", "<script>.txt").replace("tiny0", "<b>&")
        (folder / name).write_text(text)
    made = Page(write_report(folder).read_text())
    assert "script" not in made.tags
    assert made.open == []


def test_the_command_writes_it(command: Callable[..., Finished], extended: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(extended.folder, folder, ignore=shutil.ignore_patterns("export", "figures", "report.html"))
    done = command("report", folder)
    assert (done.code, done.err, done.out) == (0, "", f"wrote {folder / 'report.html'}\n")
    assert (folder / "report.html").is_file()
