"""The other commands: evaluate, search, doctor, bench, and the package's quiet beginning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, Run

Command = Callable[..., Finished]


def test_doctor_names_every_backend_and_version(command: Command) -> None:
    done = command("doctor")
    assert (done.code, done.err) == (0, "")
    for name in ("reference", "cpu", "torch", "transformers", "processor", "gpu"):
        assert name in done.out
    usable = [line for line in done.out.splitlines() if line.startswith("backend reference")]
    assert usable == ["backend reference  usable"]


def test_bench_prints_a_ratio_for_every_length(command: Command) -> None:
    done = command("bench", "--lengths", "64,128", "--dtype", "fp32")
    assert (done.code, done.err) == (0, "")
    rows = [line for line in done.out.splitlines() if line.rstrip(" │").endswith("x")]
    assert [row.split()[1] for row in rows] == ["64", "128"]


def test_evaluate_without_a_winner_measures_the_baselines(
    command: Command, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    done = command(
        *("evaluate", model_folder, "--to", 256, "--text", text_folder),
        *("--run-dir", tmp_path / "run", "--dtype", "fp32", "--heldout-documents", 1),
    )
    assert (done.code, done.err) == (0, "")
    found = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert list(found["methods"]) == ["original", "pi", "ntk", "yarn"]
    assert len(found["windows"]) == 1
    assert "differences" not in found
    assert not (tmp_path / "run" / "heldout.json").exists()


@pytest.fixture
def copied(extended: Run, tmp_path: Path) -> Path:
    return shutil.copytree(extended.folder, tmp_path / "run", ignore=shutil.ignore_patterns("export", "figures"))


def test_evaluate_takes_the_rest_of_its_settings_from_the_run(
    command: Command, extended: Run, copied: Path, model_folder: Path
) -> None:
    before = json.loads((copied / "run.json").read_text())
    done = command("evaluate", model_folder, "--to", 256, "--run-dir", copied)
    assert (done.code, done.err) == (0, "")
    ours, theirs = (json.loads((folder / "heldout.json").read_text()) for folder in (copied, extended.folder))
    assert ours.pop("passkey", None) is None
    theirs.pop("passkey")
    assert ours == theirs
    assert (copied / "evaluations.jsonl").read_bytes() == (extended.folder / "evaluations.jsonl").read_bytes()
    after = json.loads((copied / "run.json").read_text())
    assert (after["command"], after["budget"]) == (before["command"], before["budget"])


def test_a_run_from_before_there_were_methods_goes_on(command: Command, extended: Run, copied: Path) -> None:
    run = json.loads((copied / "run.json").read_text())
    for name in ("method", "objective", "space", "needles", "lengths", "ladder", "screen_documents"):
        default = run["settings"].pop(name)
        assert name == "screen_documents" or default in ("longrope", "text", "all", 2, [], None)
    run["settings"]["screen_documents"] = 1
    (copied / "run.json").write_text(json.dumps(run))
    before = (copied / "evaluations.jsonl").read_bytes()
    arguments = list(extended.arguments)
    arguments[arguments.index("--run-dir") + 1] = str(copied)
    at = arguments.index("--passkey-depths")
    done = command("search", *arguments[1:at], *arguments[at + 2 :])
    assert (done.code, done.err) == (0, "")
    assert (copied / "evaluations.jsonl").read_bytes() == before
    done = command("search", *arguments[1:at], *arguments[at + 2 :], "--objective", "needle")
    assert done.err.startswith(f'longrope: --objective: got "needle" in {copied}, expected "text"')


def test_evaluate_takes_any_factor_file_of_the_model(command: Command, copied: Path, model_folder: Path) -> None:
    arguments = ("evaluate", model_folder, "--to", 256, "--run-dir", copied, "--factors")
    done = command(*arguments, copied / "factors" / "best_seed.json")
    assert (done.code, done.err) == (0, "")
    seed = json.loads((copied / "factors" / "best_seed.json").read_text())
    found = json.loads((copied / "heldout.json").read_text())["methods"]["longrope"]["rope"]
    assert found["rescale_factors"] == seed["rescale_factors"]
    (copied / "half.json").write_text("{")
    broken = command(*arguments, copied / "half.json")
    assert (broken.code, broken.err.count("\n")) == (2, 1)
    assert broken.err.startswith(f"longrope: --factors: {copied / 'half.json'}: got a broken file")


def test_a_search_stops_at_its_budget_and_goes_on_with_a_larger_one(
    command: Command, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    arguments = (
        *("search", model_folder, "--to", 256, "--text", text_folder, "--run-dir", tmp_path / "run"),
        *("--dtype", "fp32", "--start-tokens", "0,16", "--attention-factor", "search", "--no-monotone", "--budget"),
    )
    for budget in (12, 20):
        done = command(*arguments, budget)
        assert (done.code, done.err) == (0, "")
        assert "Search done: the budget is spent" in done.out
        lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
        assert len(lines) == budget
        found = json.loads((tmp_path / "run" / "search.json").read_text())
        assert found["evaluations"] == budget
    assert found["space"]["start_tokens"] == [0, 16]
    assert found["space"]["monotone"] is False
    assert len(found["space"]["attention_factors"]) == 9


def test_other_libraries_are_silenced_before_they_are_imported() -> None:
    """tqdm reads the environment once, when it is imported; torch imports it."""
    program = "import sys, longrope.cli; assert not {'torch', 'tqdm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
