"""`longrope extend` on the tiny model, end to end, as a stranger runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Finished, Run, run_process

from longrope.data import Split
from longrope.evaluate.scoring import bucket_tokens
from longrope.search import Candidate

STAGES = (
    "inspect",
    "baselines on held-out documents",
    "search",
    "the result on held-out documents",
    "export and reload",
    "report",
)


def read(run: Run, name: str) -> Any:
    return json.loads((run.folder / name).read_text())


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]


def test_it_ends_well_and_says_nothing_on_standard_error(extended: Run) -> None:
    assert extended.finished.err == ""
    assert extended.finished.code == 0


def test_all_stages_run_in_their_order(extended: Run) -> None:
    said = [extended.finished.out.index(f"== {number}/6 {stage}\n") for number, stage in enumerate(STAGES, 1)]
    assert said == sorted(said)
    for name in (
        *("run.json", "inspection.json", "documents.json", "baselines.json", "evaluations.jsonl", "search.json"),
        *("factors/winner.json", "factors/best_seed.json", "heldout.json", "export/model.safetensors", "export.json"),
        "report.html",
    ):
        assert (extended.folder / name).is_file(), name


def test_the_search_is_within_its_sizes_and_its_best_is_the_winner(extended: Run) -> None:
    search = read(extended, "search.json")
    assert search["stopped"] == "all 3 iterations are done"
    best = min(search["history"], key=lambda one: one["score"])
    assert search["winner"] == best
    assert search["winner"]["score"] <= search["best_seed"]["score"]
    assert search["winner_is_a_seed"] == best["origin"].startswith("seed ")
    assert [one["origin"] for one in search["history"][:3]] == ["seed pi", "seed ntk", "seed yarn"]


def test_the_winner_file_holds_the_winner(extended: Run) -> None:
    search, winner = read(extended, "search.json"), read(extended, "factors/winner.json")
    assert Candidate.from_dict(winner["candidate"]) == Candidate.from_dict(search["winner"]["candidate"])
    assert winner["rescale_factors"] == search["winner"]["candidate"]["factors"]
    assert winner["objective"]["value"] == search["winner"]["score"]
    assert np.all(np.diff(winner["rescale_factors"]) >= 0)


def test_the_objective_is_the_mean_loss_of_the_search_documents_beyond_the_original_length(extended: Run) -> None:
    search = read(extended, "search.json")
    found = [
        record
        for record in lines(extended)
        if record["stage"] == "search" and record["candidate"] == search["winner"]["candidate"]
    ]
    assert len(found) == 2
    assert {record["start"] for record in found} == {tiny.ORIGINAL}
    assert search["winner"]["score"] == pytest.approx(np.mean([record["nll"] for record in found]), rel=1e-12)


def test_what_the_search_spent_is_what_the_log_says(extended: Run) -> None:
    search = read(extended, "search.json")
    spent = [record["seconds"] for record in lines(extended) if record["stage"] in ("search", "screen")]
    assert search["evaluations"] == len(spent)
    assert search["seconds"] == round(sum(spent), 1) > 0


def test_nothing_the_search_read_is_evaluated_on(extended: Run) -> None:
    by_stage: dict[str, set[str]] = {"search": set(), "screen": set(), "heldout": set(), "heldout short": set()}
    for record in lines(extended):
        if record["stage"] in by_stage:
            by_stage[record["stage"]].add(record["window"])
    documents = {"search": 2, "screen": 1, "heldout": 2, "heldout short": 2}
    assert {stage: len(windows) for stage, windows in by_stage.items()} == documents
    assert not (by_stage["search"] | by_stage["screen"]) & (by_stage["heldout"] | by_stage["heldout short"])


def test_no_evaluation_is_logged_twice(extended: Run) -> None:
    keys = [record["key"] for record in lines(extended)]
    assert len(keys) == len(set(keys))


def test_held_out_numbers_come_from_the_log(extended: Run, split: Split) -> None:
    heldout = read(extended, "heldout.json")
    assert [window["sha256"] for window in heldout["windows"]] == [window.sha256 for window in split.heldout]
    for name, method in heldout["methods"].items():
        records = [r for r in lines(extended) if r["stage"] == "heldout" and r["method"] == name]
        if name == "longrope" and not records:  # the winner is a baseline, and was measured as one
            continue
        whole = np.array([np.sum(record["block_nll"]) for record in records]).sum()
        last = np.array([np.sum(record["block_nll"][4:]) for record in records]).sum()
        assert method["nll"] == pytest.approx(last / (2 * 128), rel=1e-9)
        assert method["perplexity"] == pytest.approx(math.exp(method["nll"]))
        assert method["by_length"][-1]["nll"] == pytest.approx(whole / (2 * 255), rel=1e-9)
        edges = [(bucket["first"], bucket["last"]) for bucket in method["by_position"]]
        width = bucket_tokens(tiny.ORIGINAL)
        assert edges == [(first, first + width) for first in range(0, tiny.TARGET, width)]


def test_short_texts_read_as_the_original_bit_for_bit(extended: Run) -> None:
    heldout = read(extended, "heldout.json")
    assert heldout["short_equals_original"] is True
    assert heldout["methods"]["longrope"]["short"] == heldout["methods"]["original"]["short"]


def test_passkeys_were_asked_of_the_original_yarn_and_ours(extended: Run) -> None:
    assert set(read(extended, "heldout.json")["passkey"]) == {"original", "yarn", "longrope"}


def test_running_it_again_recomputes_nothing(extended: Run, command: Callable[..., Finished]) -> None:
    kept = ("evaluations.jsonl", "factors/winner.json", "search.json", "heldout.json", "export.json", "baselines.json")
    weights = extended.folder / "export" / "model.safetensors"
    before, written = {name: (extended.folder / name).read_bytes() for name in kept}, weights.stat().st_mtime_ns
    again = command(*extended.arguments)
    assert again.code == 0
    assert {name: (extended.folder / name).read_bytes() for name in kept} == before
    assert weights.stat().st_mtime_ns == written
    assert f"{len(lines(extended))} evaluations are there and are not repeated" in again.out


def test_another_request_for_the_same_directory_is_refused(extended: Run, command: Callable[..., Finished]) -> None:
    done = command(*extended.arguments, "--seed", "8")
    assert done.code == 2
    assert done.err.startswith(f"longrope: --seed: got 8 in {extended.folder}, expected 7")
    assert done.err.count("\n") == 1


def test_a_wrong_argument_ends_a_process_with_code_2_and_one_line(model_folder: Path) -> None:
    done = run_process("extend", str(model_folder), "--to", "100")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err == "longrope: --to: got 100, expected more than the original length 128\n"
