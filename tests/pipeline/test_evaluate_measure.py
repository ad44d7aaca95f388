"""`longrope measure`: what it writes and prints, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from conftest import Finished, Run
from test_report import Page
from test_team import PROGRAM, free_port

import longrope_kernels as lk
from longrope.evaluate.measure import Method, regime

Command = Callable[..., Finished]
LENGTHS = "128,200,256"


@pytest.fixture
def measure(command: Command, model_folder: Path, text_folder: Path, tmp_path: Path) -> Command:
    """`longrope measure` on the tiny model, in a run directory of its own."""

    def run(*options: object) -> Finished:
        return command(
            *("measure", model_folder, "--run-dir", tmp_path / "run", "--dtype", "fp32", "--threads", 1),
            *("--text", text_folder, *options),
        )

    return run


@pytest.fixture
def copied(extended: Run, tmp_path: Path) -> Path:
    return shutil.copytree(extended.folder, tmp_path / "run", ignore=shutil.ignore_patterns("export", "figures"))


def read(folder: Path, method: str) -> Any:
    return json.loads((folder / "measured" / f"{method}.json").read_text())


def test_every_baseline_is_one_line(measure: Command, tmp_path: Path) -> None:
    methods = ("original", "pi", "ntk", "dynamic-ntk", "yarn")
    done = measure("--lengths", LENGTHS, "--tasks", "perplexity,sliding", "--stride", 64, "--method", ",".join(methods))
    assert (done.code, done.err) == (0, "")
    rows = {method: read(tmp_path / "run", method)["perplexity"]["rows"] for method in methods}
    for method in methods:
        assert rows[method][0] == rows["original"][0], "up to the original length every method is the original"
        assert [row["length"] for row in rows[method]] == [128, 200, 256]
    at_target = {method: rows[method][2]["nll"] for method in methods}
    assert at_target["dynamic-ntk"] == at_target["ntk"], "at its target, dynamic NTK is NTK"
    assert len(set(at_target.values())) == 4
    assert rows["dynamic-ntk"][1]["nll"] != rows["ntk"][1]["nll"], "below it, it stretches less"
    assert not rows["yarn"][0]["minus"]
    assert rows["yarn"][2]["minus"]["pi"]["mean"] == pytest.approx(at_target["yarn"] - at_target["pi"])
    assert "loss at 256, YaRN minus original: " in done.out
    sliding = read(tmp_path / "run", "yarn")["sliding"]
    assert sliding["stride"] == 64
    assert [row["windows"] for row in sliding["rows"]] == [6, 4, 2]
    assert sliding["rows"][2]["nll"] == rows["yarn"][2]["nll"], "a window as long as the text"
    for title in ("original", "PI", "NTK", "dynamic NTK", "YaRN"):
        assert re.search(rf"│ {title} ", done.out)


def test_questions_are_scored_drawn_and_reported(measure: Command, tmp_path: Path) -> None:
    done = measure(
        *("--lengths", "400,800", "--to", 800, "--tasks", "passkey,multi-needle,niah_single,vt", "--needles", 3),
        *("--samples", 2, "--depths", "0,1", "--method", "yarn", "--text", "/nowhere.txt"),  # no text is read
    )
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "run"
    found = read(folder, "yarn")
    assert "perplexity" not in found
    for task in ("passkey", "multi-needle"):
        assert [row["length"] for row in found[task]["rows"]] == [400, 800]
        assert [[cell["trials"] for cell in row["cells"]] for row in found[task]["rows"]] == [[2, 2]] * 2
    assert {(row["task"], row["length"], row["samples"]) for row in found["ruler"]["rows"]} == {
        (task, length, 2) for task in ("niah_single", "vt") for length in (400, 800)
    }
    assert all(row["nll_low"] <= row["nll"] <= row["nll_high"] for row in found["ruler"]["rows"])
    figures = {file.name for file in (folder / "figures").iterdir()}
    assert {f"{task}_yarn.{kind}" for task in ("passkey", "multi-needle") for kind in ("png", "svg")} <= figures
    assert (folder / "figures/passkey_yarn.svg").read_text().startswith("<svg")
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.text)
    assert page.open == page.fetches == []
    assert page.tags.count("svg") == 3
    share = found["passkey"]["rows"][0]
    assert f"{share['share']:.0%} [{share['low']:.0%}, {share['high']:.0%}]" in text
    for part in ("Passkeys by length and depth", "Several needles", "RULER-like tasks", "niah_single", "Hsieh"):
        assert part in text


def test_nothing_is_computed_twice(measure: Command, tmp_path: Path) -> None:
    arguments = ("--lengths", "256", "--tasks", "perplexity,passkey", "--samples", 1, "--depths", "0.5")
    assert measure(*arguments, "--method", "pi").code == 0
    folder = tmp_path / "run"
    log, result = (folder / "evaluations.jsonl").read_bytes(), read(folder, "pi")
    assert measure(*arguments, "--method", "pi").code == 0
    assert (folder / "evaluations.jsonl").read_bytes() == log
    assert read(folder, "pi") == result


def test_methods_share_what_they_have_in_common_with_the_model() -> None:
    """A model that was extended before has a ladder of its own; each of its regimes is shared where it is the same."""
    short, long = lk.RopeScaling(32, 1000.0), lk.RopeScaling.pi(32, 1000.0, 2.0)
    own = lk.LongRope(128, {128: short, 256: long})
    context: Any = SimpleNamespace(loaded=SimpleNamespace(rope=own))
    extended = lk.LongRope(128, {128: short, 256: long, 1024: lk.RopeScaling.pi(32, 1000.0, 8.0)})
    always_long = lk.LongRope(128, {1024: long})
    for ladder, length, shared in (
        *((extended, 100, True), (extended, 256, True), (extended, 257, False)),
        *((always_long, 100, False), (always_long, 200, True)),
    ):
        method = Method("m", "m", lambda length, ladder=ladder: ladder)
        assert regime(context, method, length) == (own if shared else ladder)


def test_a_killed_measurement_goes_on(measure: Command, tmp_path: Path) -> None:
    arguments = ("--lengths", "256", "--tasks", "perplexity,sliding", "--stride", 32, "--method", "yarn", "--to", 320)
    assert measure(*arguments).code == 0
    folder = tmp_path / "run"
    whole, lines = read(folder, "yarn"), (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(folder / "measured")
    (folder / "evaluations.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    done = measure(*arguments)
    assert "cut short" in done.out
    assert read(folder, "yarn") == whole
    kept = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    assert kept[:2] == lines[:2]
    assert len(kept) == len(lines)


def test_two_ranks_score_the_windows_as_one_does(
    measure: Command, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    asked = ("--lengths", "128,256", "--tasks", "perplexity,sliding", "--stride", "64", "--method", "original,yarn")
    assert measure(*asked).code == 0
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    program = (tmp_path / "program.py", 1, 0)  # rank 0 waits for a record of rank 1, which is not killed
    options = ("measure", model_folder, "--run-dir", tmp_path / "two", "--dtype", "fp32", "--threads", 1)
    line = [sys.executable, *torchrun, *program, *options, "--text", text_folder, *asked]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"rank":1' in (tmp_path / "two/evaluations.jsonl").read_text()
    for method in ("original", "yarn"):
        assert read(tmp_path / "two", method) == read(tmp_path / "run", method)


def test_a_later_call_adds_to_what_is_there(measure: Command, tmp_path: Path) -> None:
    assert measure("--lengths", "256", "--tasks", "perplexity", "--method", "yarn").code == 0
    before = read(tmp_path / "run", "yarn")
    assert measure("--to", 256, "--lengths", "250", "--tasks", "passkey", "--samples", 1, "--method", "yarn").code == 0
    after = read(tmp_path / "run", "yarn")
    assert after.pop("passkey")["rows"]
    assert after == before


def test_in_a_run_directory_it_measures_the_winner_on_the_held_out_documents(
    command: Command, copied: Path, model_folder: Path
) -> None:
    done = command("measure", model_folder, "--run-dir", copied, "--tasks", "perplexity")
    assert (done.code, done.err) == (0, "")
    heldout = json.loads((copied / "heldout.json").read_text())
    found = read(copied, "longrope")
    assert found["target_length"] == tiny.TARGET
    assert [row["length"] for row in found["perplexity"]["rows"]] == [64, 128, 256]
    assert found["perplexity"]["documents"] == heldout["windows"]
    by_length = {row["length"]: row["nll"] for row in heldout["methods"]["longrope"]["by_length"]}
    assert found["perplexity"]["rows"][2]["nll"] == pytest.approx(by_length[256], rel=1e-6)
    page = (copied / "report.html").read_text()
    assert "Perplexity by length, non-overlapping windows" in page
    assert "Held-out perplexity" in page


def test_factors_are_not_measured_on_what_they_were_searched_on(
    command: Command, extended: Run, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    winner = extended.folder / "factors/winner.json"
    searched = json.loads(winner.read_text())["objective"]["documents"][0]["document"]
    arguments = ("measure", model_folder, "--run-dir", tmp_path / "run", "--dtype", "fp32", "--factors", winner)
    done = command(*arguments, "--lengths", 256, "--tasks", "perplexity", "--heldout-text", searched)
    assert done.code == 2
    assert f"--factors: got {winner}, searched on {searched}, expected one that did not read" in done.err
    assert command(*arguments, "--lengths", 256, "--tasks", "passkey", "--samples", 1, "--depths", "0").code == 0
    (file,) = (tmp_path / "run/measured").glob("factors-*.json")
    assert json.loads(file.read_text())["title"] == "winner.json"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "--lengths: got nothing, expected tokens, separated by commas; or --to"),
        (("--lengths", "none"), "--lengths: got none, expected tokens"),
        (("--lengths", "a"), "--lengths: got 'a', expected ints separated by commas"),
        (("--lengths", "256,1"), "--lengths: got 1, expected from 2 tokens to 256, the target (--to)"),
        (("--lengths", "512", "--to", 256), "--lengths: got 512, expected from 2 tokens to 256, the target (--to)"),
        (("--lengths", "256", "--tasks", "ppl"), "--tasks: got ppl, expected perplexity, sliding, passkey"),
        (("--lengths", "256", "--tasks", "none"), "--tasks: got none, expected one or more of perplexity"),
        (("--lengths", "256", "--depths", "0,2"), "--depths: got 0,2, expected one or more different numbers"),
        (("--lengths", "256", "--depths", "none"), "--depths: got none, expected one or more different numbers"),
        (("--lengths", "256", "--samples", 0), "--samples: got 0, expected an int >= 1"),
        (("--lengths", "256", "--seed", -1), "--seed: got -1, expected an int >= 0"),
        (("--lengths", "256", "--method", "rope"), "--method: got rope, expected original, pi, ntk, dynamic-ntk, yarn"),
        (("--lengths", "256", "--method", "longrope"), "--method: got longrope, expected a run directory with"),
        (("--lengths", "128", "--method", "pi"), "--to: got 128, expected more than the original length 128 for pi"),
        (("--lengths", "150", "--tasks", "passkey"), "--lengths: got 150 tokens, expected at least 188, what passkey"),
        (("--lengths", "256", "--tasks", "cwe"), "--lengths: got 256 tokens, expected at least"),
        (("--lengths", "256", "--tasks", "multi-needle", "--needles", 1), "--needles: got 1, expected an int between"),
        (
            ("--lengths", "64,256", "--tasks", "sliding", "--stride", 64),
            "--stride: got 64, expected a number of tokens",
        ),
        (("--lengths", "9999", "--tasks", "perplexity"), "--text: got no document of 9999 tokens"),
    ],
)
def test_a_wrong_argument_is_one_line(measure: Command, options: tuple[object, ...], line: str) -> None:
    done = measure(*options)
    assert done.code == 2, done
    assert line in done.err
    assert done.err.count("\n") == 1


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_line_says_how_to_get_it(measure: Command) -> None:
    done = measure("--to", 256, "--tasks", "none", "--lm-eval", "longrope_tiny")
    assert done.code == 2
    assert "--lm-eval: got longrope_tiny, expected the package lm_eval installed (pip install lm_eval)" in done.err
