"""lm-eval on the packaged task, where lm-eval is installed: `make test` does not install its 40 packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Finished

import longrope_kernels as lk
from longrope.errors import UsageError
from longrope.evaluate import harness
from longrope.models import LoadedModel
from longrope.run import EvaluationLog

ITEMS = [json.loads(line) for line in (harness.PACKAGED / "longrope_tiny.jsonl").read_text().splitlines()]


def test_the_packaged_items_are_whole() -> None:
    assert len(ITEMS) == len({item["text"] for item in ITEMS}) == 20
    for item in ITEMS:
        assert len(set(item["endings"])) == 3
        assert 0 <= item["right"] < 3
    assert {item["right"] for item in ITEMS} == {0, 1, 2}


class TestWhereItIsInstalled:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("lm_eval")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    @pytest.fixture
    def log(self, tmp_path: Path) -> Iterator[EvaluationLog]:
        opened = EvaluationLog(tmp_path / "evaluations.jsonl")
        yield opened
        opened.close()

    def test_its_score_is_that_of_our_own_losses_under_the_ladder(
        self, loaded: LoadedModel, log: EvaluationLog
    ) -> None:
        # A ladder whose long regime begins at 30 tokens: some of the sentences are read under it, some are not.
        long = lk.RopeScaling.pi(32, 1000.0, 4.0)
        rope = lk.LongRope(30, {30: loaded.base, tiny.TARGET: long})
        record = harness.lm_eval(loaded, log, rope, "longrope_tiny", tiny.TARGET)
        loaded.use(rope)
        right = 0
        for item in ITEMS:
            losses = []
            for ending in item["endings"]:
                before, ids = (
                    loaded.tokenizer(text)["input_ids"] for text in (item["text"], f"{item['text']} {ending}")
                )
                losses.append(float(losses_of(loaded, ids, len(before)).sum()))
            right += losses.index(min(losses)) == item["right"]
        found = record["results"]["longrope_tiny"]["acc"]
        assert found["value"] == right / 20
        assert found["samples"] == 20
        assert found["low"] <= found["value"] <= found["high"]

    def test_a_task_is_run_once_for_each_ladder(self, loaded: LoadedModel, log: EvaluationLog) -> None:
        one = harness.lm_eval(loaded, log, loaded.rope, "longrope_tiny", 256, limit=3)
        assert harness.lm_eval(loaded, log, loaded.rope, "longrope_tiny", 256, limit=3) == one
        assert len(log.records) == 1
        assert one["results"]["longrope_tiny"]["acc"]["samples"] == 3

    def test_what_goes_wrong_in_lm_eval_is_one_line(
        self, loaded: LoadedModel, log: EvaluationLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "_manager_of", lambda task: 1 / 0)
        with pytest.raises(
            UsageError, match=r"--lm-eval: got longrope_tiny \(ZeroDivisionError.*\), expected one whose"
        ):
            harness.lm_eval(loaded, log, loaded.rope, "longrope_tiny", 256)
        assert not log.records

    def test_the_command_prints_logs_and_reports_it(
        self, command: Callable[..., Finished], model_folder: Path, text_folder: Path, tmp_path: Path
    ) -> None:
        done = command(
            *("measure", model_folder, "--run-dir", tmp_path / "run", "--to", 256, "--dtype", "fp32"),
            *("--text", text_folder, "--tasks", "none", "--lm-eval", "longrope_tiny", "--method", "yarn"),
        )
        assert (done.code, done.err) == (0, "")
        assert "lm-eval longrope_tiny, YaRN: acc 0." in done.out
        (found,) = json.loads((tmp_path / "run/measured/yarn.json").read_text())["lm_eval"]
        assert found["results"]["longrope_tiny"]["acc"]["samples"] == 20
        assert "Short benchmarks, by lm-eval" in (tmp_path / "run/report.html").read_text()

    def test_an_unknown_task_is_one_line(self) -> None:
        with pytest.raises(UsageError, match="--lm-eval: got no_such_task, expected a task of lm-eval"):
            harness.check(("no_such_task",))


def losses_of(loaded: LoadedModel, ids: list[int], start: int) -> torch.Tensor:
    """Return the losses from index `start` on, as lm-eval has them: its forward reads all tokens but the last."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[start - 1 :], torch.tensor(ids[start:]), reduction="none")
