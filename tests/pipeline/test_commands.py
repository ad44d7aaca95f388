"""The other commands: evaluate, search, doctor, bench, and the package's quiet beginning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Finished, Run

import longrope_kernels as lk
from longrope import data, models
from longrope.loss import token_nll

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
    command: Command, model_folder: Path, text_folder: Path, split: data.Split, tmp_path: Path
) -> None:
    done = command(
        *("evaluate", model_folder, "--to", 256, "--text", text_folder),
        *("--run-dir", tmp_path / "run", "--dtype", "fp32", "--heldout-documents", 1),
    )
    assert (done.code, done.err) == (0, "")
    found = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert list(found["methods"]) == ["original", "pi", "ntk", "dynamic-ntk", "yarn"]
    assert len(found["windows"]) == 1
    assert "differences" not in found
    methods = {
        name: {one["length"]: one["nll"] for one in method["by_length"]} for name, method in found["methods"].items()
    }
    assert list(methods["ntk"]) == [160, 192, 224, 256]
    assert methods["dynamic-ntk"][256] == methods["ntk"][256], "at the target it is NTK"
    # A shorter text has less of it: what a process of its own says of such a text under NTK made for that length.
    loaded = models.load(str(model_folder), "fp32")
    (window,) = split.heldout[:1]
    for length in (160, 224):
        loaded.use(lk.LongRope.ntk(32, 1000.0, tiny.ORIGINAL, length))
        alone = float(token_nll(loaded.model, torch.tensor(window.tokens[:length])).double().mean())
        assert methods["dynamic-ntk"][length] == pytest.approx(alone, abs=1e-6)
        assert abs(methods["ntk"][length] - alone) > 1e-3
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
    for part in ("methods", "differences"):
        ours[part].pop("dynamic-ntk")  # which the command says besides
    assert ours == theirs
    logs = [(folder / "evaluations.jsonl").read_text() for folder in (copied, extended.folder)]
    assert logs[0].startswith(logs[1])
    new = [json.loads(line) for line in logs[0][len(logs[1]) :].splitlines()]
    assert {record["method"] for record in new} == {"dynamic-ntk"}, "nothing else is computed again"
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


def test_evaluate_takes_a_model_that_was_extended_to_the_target(
    command: Command, extended: Run, text_folder: Path, tmp_path: Path
) -> None:
    """It counts as it was before: the same weights, extended from the same length, so the same numbers."""
    whole = json.loads((extended.folder / "heldout.json").read_text())
    asked = ("--text", text_folder, "--run-dir", tmp_path / "run", "--dtype", "fp32", "--threads", 1)
    factors = extended.folder / "factors" / "winner.json"
    done = command("evaluate", extended.folder / "export", "--to", 256, "--factors", factors, *asked)
    assert (done.code, done.err) == (0, "")
    again = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert again["original_length"] == tiny.ORIGINAL
    assert again["short_equals_original"]
    for method, found in whole["methods"].items():
        assert again["methods"][method]["rope"] == found["rope"]
        assert again["methods"][method]["nll"] == pytest.approx(found["nll"], abs=1e-6), method
    own = command("evaluate", extended.folder / "export", "--to", 256, *asked)
    assert (own.code, own.err) == (0, ""), "without a factor file it is the ladder the model has"
    ladder = json.loads((tmp_path / "run" / "heldout.json").read_text())["methods"]["longrope"]
    assert ladder["nll"] == pytest.approx(whole["methods"]["longrope"]["nll"], abs=1e-6)
    for length in (128, 100):
        less = command("evaluate", extended.folder / "export", "--to", length, "--factors", factors, *asked)
        assert (less.code, less.err) == (
            2,
            f"longrope: --to: got {length}, expected more than the original length {tiny.ORIGINAL}\n",
        )


def test_evaluate_refuses_a_factor_file_that_was_searched_on_what_it_is_measured_on(
    command: Command, extended: Run, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    search = json.loads((extended.folder / "documents.json").read_text())["search"]
    read = tmp_path / "read"
    read.mkdir()
    for window in search:
        shutil.copy(window["document"], read)
    done = command(
        *("evaluate", model_folder, "--to", 256, "--text", text_folder, "--heldout-text", read, "--dtype", "fp32"),
        *("--run-dir", tmp_path / "run", "--factors", extended.folder / "factors" / "winner.json"),
    )
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith(f"longrope: --factors: got {extended.folder / 'factors' / 'winner.json'}, searched on")
