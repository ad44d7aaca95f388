"""The benchmarks' machinery on tiny shapes: what is timed is checked, what is written can be read and rendered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the pipeline extra")
pytest.importorskip("transformers", reason="needs the pipeline extra")

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not installed

import longrope_kernels as lk
from bench import cpu, llama_cpp, peers, plots, readme, record, tables, timing, workloads
from bench.workloads import OURS, OURS_BF16, PACKED, TORCH, UNROTATED, Disagreement, Shape

SHAPE = Shape(4, 2, 32, 48, torch.bfloat16)
TINY = 256


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of `make bench-cpu` but the model, the compiled peer and llama.cpp, all tokens divided."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "unavailable_reason", lambda: "not in this test")
        patch.setattr(peers, "compile_failure", lambda call: "not in this test")
        assert cpu.run(folder, budget=0.01, divisor=TINY, figure=None) == 0
    return folder


@pytest.fixture
def content(results: Path) -> dict[str, Any]:
    return record.read(results / "cpu.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [workloads.prefill, workloads.training, workloads.decode], ids=lambda f: f.__name__)
def test_ours_and_torch_agree_within_the_dtype(build: Any, dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 32, 48, dtype)
    work = build(shape, compile=False)
    assert 0 < work.differences[TORCH] <= workloads.tolerance(shape)


@pytest.mark.parametrize("backward", [False, True])
def test_rope_alone_agrees(backward: bool) -> None:
    assert workloads.rope(SHAPE, backward).differences[TORCH] <= workloads.tolerance(SHAPE)


@pytest.mark.parametrize("build", [workloads.prefill, workloads.training, workloads.decode], ids=lambda f: f.__name__)
def test_a_kernel_that_rotates_by_other_factors_is_not_timed(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lk.attention
    wrong = lk.RopeScaling(head_dim=32, theta=1e4)
    monkeypatch.setattr(lk, "attention", lambda q, k, v, scaling=None, **rest: right(q, k, v, wrong, **rest))
    with pytest.raises(Disagreement, match="torch differs from ours by"):
        build(SHAPE, compile=False)


def test_a_difference_that_is_not_a_number_is_refused() -> None:
    bad = torch.full((4,), float("nan"))
    assert workloads.difference(bad, torch.ones(4)) == float("inf")


def test_a_choice_of_no_row_is_refused(tmp_path, capsys):
    assert cpu.run(tmp_path, only="backwards") == 2
    assert "--only: 'backwards' is in no row's section or name; sections are prefill" in "".join(capsys.readouterr())
    assert not any(tmp_path.iterdir())


def test_a_row_whose_sides_disagree_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "tolerance", lambda shape: 0.0)
    monkeypatch.setattr(peers, "compile_failure", lambda call: "not in this test")
    assert cpu.run(tmp_path, only="decode", budget=0.01, divisor=TINY, figure=None) == 1
    row, int8 = json.loads((tmp_path / "cpu.partial.json").read_text())["rows"]
    assert "seconds" not in row
    assert "expected at most 0" in row["refused"]
    assert int8["name"].startswith("int8")
    assert int8["ratios"][OURS_BF16] > 0, "a row that is refused costs no other"


def test_an_int8_cache_that_answers_wrong_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = lk.KVCache.attend

    def wrong(cache: lk.KVCache, *arguments: Any) -> Any:
        return attend(cache, *arguments) * (1.0 if cache.pages.key_scale is None else 0.9)

    monkeypatch.setattr(lk.KVCache, "attend", wrong)
    with pytest.raises(Disagreement, match="ours, bf16 cache differs from ours"):
        workloads.decode_int8(SHAPE)


def test_a_record_says_where_it_comes_from_and_has_a_ratio_and_a_share_in_every_row(content: dict[str, Any]) -> None:
    assert content["complete"]
    assert {"processor", "cores", "instruction_set"} <= content["machine"].keys()
    assert {"python", "torch", "transformers", "longrope_kernels"} <= content["versions"].keys()
    assert {"commit", "modified", "date", "threads"} <= content.keys()
    assert {row["section"] for row in content["rows"]} >= {"prefill", "training", "decode", "growth"}
    for row in content["rows"]:
        assert row["seconds"][OURS] > 0
        assert len(row["samples"]["seconds"][OURS]) == row["rounds"] >= timing.MIN_ROUNDS
        assert row["ratios"].keys() == row["seconds"].keys() - {OURS}
        for side, ratio in row["ratios"].items():
            assert ratio == pytest.approx(row["seconds"][side] / row["seconds"][OURS], rel=1e-3)
        for name, share in row["shares"].items():
            assert share == pytest.approx(row["rate"] / row["ceilings"][name], rel=1e-3)
    prefill = next(row for row in content["rows"] if row["section"] == "prefill")
    assert {TORCH, UNROTATED} <= prefill["ratios"].keys()
    assert PACKED in next(row for row in content["rows"] if row["section"] == "decode")["ratios"]


def test_a_run_that_was_interrupted_keeps_its_rows_and_leaves_the_last_whole_one(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (results / "cpu.json").read_text()
    (tmp_path / "cpu.json").write_text(before)
    measured = cpu.measure
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(cpu, "measure", interrupted)
    monkeypatch.setattr(peers, "compile_failure", lambda call: "not in this test")
    assert cpu.run(tmp_path, budget=0.01, divisor=TINY, figure=None) == 130
    partial = json.loads((tmp_path / "cpu.partial.json").read_text())
    assert (len(partial["rows"]), partial["complete"]) == (1, False)
    assert (tmp_path / "cpu.json").read_text() == before
    with pytest.raises(ValueError, match="expected schema 1 of a run that ended"):
        record.read(tmp_path / "cpu.partial.json")


def test_sides_run_in_turns_and_the_first_changes() -> None:
    order: list[str] = []
    sides = {name: (lambda name=name: order.append(name)) for name in "ab"}
    samples = timing.in_turns(sides, {"probe": lambda: 2.0}, budget_seconds=0.0)
    assert order == list("ab" + "ab" + "ba" + "ab")
    assert samples.ceiling("probe") == 2.0
    assert len(samples.seconds["a"]) == len(samples.seconds["b"]) == 3


def test_reads_of_memory_are_measured_alone_and_beside_the_multiplications_of_the_work() -> None:
    found = timing.probes("memory", torch.bfloat16, 0.01)
    assert list(found) == ["read"]
    found = timing.probes("memory", torch.bfloat16, 0.01, operations=2000)
    if not any("avx512" in level for level in lk.backends.cpu._native.levels()):
        assert list(found) == ["read"]
        return
    assert list(found) == ["read", timing.READ_AND_MULTIPLY]
    # 2,000 multiply-adds for 512 bytes: at most 1 a cycle of 8 GHz, so that no core reads more than 2 GB/s.
    slow = max(found[timing.READ_AND_MULTIPLY]() for _ in range(3))
    assert 0.0 < slow < 2.1 * torch.get_num_threads()


def test_the_readme_gets_what_the_json_says_and_nothing_else_changes(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = ["--readme", str(page), "--results", str(results), "--figure", str(tmp_path / "none.png")]
    assert readme.main(arguments) == 0
    once = page.read_text()
    assert once.startswith(f"before\n{readme.BEGIN}\n")
    assert once.endswith(f"{readme.END}\nafter\n")
    assert "old" not in once
    content = record.read(results / "cpu.json")
    for row in content["rows"]:
        assert tables.duration(row["seconds"][OURS]) in once
    assert readme.main(arguments) == 0
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["no marker", f"{readme.BEGIN} only", f"{readme.END}{readme.BEGIN}"])
def test_a_readme_without_its_markers_is_left_alone(text: str, results: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "README.md"
    page.write_text(text)
    assert readme.main(["--readme", str(page), "--results", str(results)]) == 2
    assert page.read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_the_figure_is_drawn_from_the_record(content: dict[str, Any], tmp_path: Path) -> None:
    assert plots.draw(content, tmp_path / "time.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="expected some"):
        plots.draw({**content, "rows": []})


def test_a_table_is_the_same_in_markdown() -> None:
    table = tables.Table(["work", "ours"], [["a", "1 s"]])
    assert table.markdown() == "| work | ours |\n| --- | ---: |\n| a | 1 s |"
