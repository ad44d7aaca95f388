"""llama.cpp as a peer: the model that is made for it, the fit of its times, and a row where it is installed."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="needs the pipeline extra")
pytest.importorskip("transformers", reason="needs the pipeline extra")
pytest.importorskip("gguf", reason="needs the pipeline extra")

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not installed

import longrope_kernels as lk
from bench import cpu, llama_cpp, record, tables, timing, workloads
from bench.workloads import LLAMA, LLAMA_UNFUSED, OURS, OURS_FP16, Disagreement, Shape

HEADS = (4, 2, 32)
THETA = 1e5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "one-layer.gguf"
    return llama_cpp.write_model(path, llama_cpp.make_weights(*HEADS), *HEADS, 512, THETA)


def test_transformers_reads_the_model_and_gives_the_logits_that_llama_cpp_is_held_to(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    config = read.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (1, llama_cpp.HIDDEN, HEADS[2])
    words = llama_cpp.prompt(100)
    with torch.no_grad():
        expected = read(torch.from_numpy(words).long()[None]).logits[0, -1]
    scaling = lk.RopeScaling(head_dim=HEADS[2], theta=THETA, interleaved=True)
    weights = llama_cpp.make_weights(*HEADS)
    assert workloads.difference(workloads.last_logits(weights, scaling, words), expected) < 1e-4
    bound = workloads.tolerance(Shape(*HEADS, 100, torch.float16))
    for wrong in (scaling.replace(theta=2 * THETA), scaling.replace(interleaved=False)):
        assert workloads.difference(workloads.last_logits(weights, wrong, words), expected) > 10 * bound
    assert workloads.difference(workloads.last_logits(weights, scaling, words[1:]), expected) > bound


def test_prompts_differ_only_in_where_they_end() -> None:
    assert np.array_equal(llama_cpp.prompt(100)[:30], llama_cpp.prompt(30))
    assert llama_cpp.lengths(16384) == (4096, 8192, 16384)


@pytest.mark.parametrize(("linear", "quadratic"), [(2e-6, 3e-9), (0.0, 3e-9), (1e-5, 1e-9)])
def test_the_fit_finds_the_part_that_grows_as_the_square(linear: float, quadratic: float) -> None:
    seconds = {n: linear * n + quadratic * n * n for n in llama_cpp.lengths(4096)}
    assert llama_cpp.quadratic_seconds(seconds) == pytest.approx(quadratic * 4096**2, rel=1e-6)


def test_noise_moves_the_fit_no_further_than_the_noise_and_never_above_the_whole_time() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        noise = 1 + random.uniform(-0.02, 0.02, 3)
        seconds = {n: (1e-6 * n + 2e-8 * n * n) * x for n, x in zip(llama_cpp.lengths(4096), noise, strict=True)}
        found = llama_cpp.quadratic_seconds(seconds)
        assert found == pytest.approx(2e-8 * 4096**2, rel=0.08)
        assert found <= 1.02 * seconds[4096]


def test_times_that_grow_faster_than_the_square_are_all_attention() -> None:
    seconds = {n: 1e-12 * n**3 for n in (1024, 2048, 4096)}  # without the bound on a, 1.5 times the whole
    assert 0.8 * seconds[4096] < llama_cpp.quadratic_seconds(seconds) < 1.2 * seconds[4096]


@pytest.mark.parametrize("seconds", [{4096: 1.0}, {}, {0: 1.0, 4: 2.0}, {1024: 1.0, 2048: 2.1}, {1024: 2.0, 2048: 1.0}])
def test_times_without_such_a_part_are_refused_in_one_line(seconds: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"^seconds: got .*, expected [^\n]*$"):
        llama_cpp.quadratic_seconds(seconds)


def test_a_derived_side_is_calculated_from_the_medians_of_the_others() -> None:
    samples = timing.Samples({"a": [1.0, 2.0, 60.0], "b": [0.5, 0.5, 30.0]})
    samples.derive("c", lambda seconds: seconds["a"] - seconds["b"])
    assert samples.median("c") == 1.5


def test_where_it_is_absent_there_is_no_row_but_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert llama_cpp.note() == "not installed"
    assert "llama.cpp" not in {plan.section for plan in cpu.plans()}


def test_where_it_is_installed_its_rows_stay_long_enough_to_be_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "unavailable_reason", lambda: None)
    found = [plan.shape.tokens for plan in cpu.plans(divisor=256) if plan.section == "llama.cpp"]
    assert found == [1024] * 3


def test_a_process_that_ends_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"^llama.cpp: its process ended with status 1: no word$"):
        llama_cpp.Session(model, llama_cpp.Settings(64, 1))


class Library(SimpleNamespace):
    """The functions of llama_cpp that are called, answering as asked and remembering how they were called."""

    def __init__(self, status: int = 0) -> None:
        import ctypes

        self.parameters, self.calls, self.status = SimpleNamespace(), [], status
        self.llama_token = ctypes.c_int32
        self.logits = (ctypes.c_float * llama_cpp.WORDS)(*range(llama_cpp.WORDS))

    def __getattr__(self, name: str) -> Any:
        answers = {
            "llama_context_default_params": self.parameters,
            "llama_print_system_info": b"CPU : AVX512 = 1",
            "llama_decode": self.status,
            "llama_get_logits_ith": self.logits,
        }

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return answers.get(name, 1)

        return call


def test_every_prompt_is_decoded_from_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    answers = StringIO()
    llama_cpp.serve("model", llama_cpp.Settings(1000, 3, flash=False), ["100\n", "1000\n"], answers)
    built, *decoded = (json.loads(line) for line in answers.getvalue().splitlines())
    assert "AVX512" in built["build"]
    assert [answer["logits"][-1] for answer in decoded] == [255.0, 255.0]
    at = library.parameters
    assert (at.n_ctx, at.n_batch, at.n_ubatch, at.n_threads, at.n_threads_batch, at.flash_attn_type) == (
        (1024, 1024, llama_cpp.UBATCH, 3, 3, 0)
    )
    steps = [name for name in library.calls if name in ("llama_memory_clear", "llama_decode", "llama_synchronize")]
    assert steps == ["llama_memory_clear", "llama_decode", "llama_synchronize"] * 2
    monkeypatch.setitem(sys.modules, "llama_cpp", Library(status=1))
    with pytest.raises(SystemExit, match="llama_decode of 100 tokens answers 1"):
        llama_cpp.serve("model", llama_cpp.Settings(1000, 3), ["100\n"], StringIO())


@pytest.fixture
def installed() -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp itself, from the package llama-cpp-python")


@pytest.mark.usefixtures("installed")
def test_llama_cpp_gives_our_logits_and_its_attention_is_a_side_of_the_row() -> None:
    """What a run of the benchmark does, but for the clock, which a busy machine would spoil."""
    shape = Shape(9, 3, 64, 600, torch.bfloat16)
    work = workloads.beside_llama_cpp(shape)
    assert 0 < max(work.differences[name] for name in (LLAMA, LLAMA_UNFUSED)) < 0.02
    for call in work.sides.values():
        call()
    seconds = {OURS: 0.1, OURS_FP16: 0.3}
    for name, factor in ((LLAMA, 1), (LLAMA_UNFUSED, 2)):
        for n in (150, 300, 600):
            seconds[f"{name}, model of {n:,} tokens"] = factor * (1e-3 * n + 1e-5 * n * n)
    assert seconds.keys() == work.sides.keys()
    samples = timing.Samples({name: [value] for name, value in seconds.items()})
    for name, calculate in work.derived.items():
        samples.derive(name, calculate)
    row = record.row("name", "llama.cpp", work, samples)
    assert row["ratios"][LLAMA] == pytest.approx(36)
    assert row["ratios"][LLAMA_UNFUSED] == pytest.approx(72)
    beside = {cells[2]: cells[4] for cells in tables.comparisons({"rows": [row]}).rows}
    assert beside == {"llama.cpp, flash attention": "36.00x", "llama.cpp, without it": "72.00x", "ours, fp16": "3.00x"}
    assert "n_ubatch 512" in llama_cpp.note()


@pytest.mark.usefixtures("installed")
def test_a_model_with_other_frequencies_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = llama_cpp.write_model
    monkeypatch.setattr(llama_cpp, "write_model", lambda *given: right(*given[:-1], 2 * given[-1]))
    with pytest.raises(Disagreement, match=r"llama.cpp differs from ours by"):
        workloads.beside_llama_cpp(Shape(*HEADS, 300, torch.bfloat16))


@pytest.mark.usefixtures("installed")
def test_a_prompt_longer_than_the_cache_is_one_line(model: Path) -> None:
    session = llama_cpp.Session(model, llama_cpp.Settings(256, 1))
    with pytest.raises(RuntimeError, match=r"^llama.cpp: its process ended with status -?\d+: [^\n]+$"):
        session.decode(512)
