"""The memory foreseen is about the memory used, and what is said to fit does."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

import longrope_kernels as lk
from longrope import models
from longrope.errors import PipelineError
from longrope.tune import TuneSettings, memory
from longrope.tune.loss import CausalLoss
from longrope.tune.stage import run_tuning
from longrope_kernels.integrations.transformers import enable

CONSTANT = 30 * 2**20  # what the kernels and torch take for themselves
# As published, and as transformers builds them.
LLAMA2_7B = memory.Shape(6_738_415_616, 2 * 6_738_415_616, 32, 4096, 11008, 4096, 4096, 32000)
# dtype, length, sizes
CASES: dict[str, tuple[str, int, dict[str, int]]] = {
    "activations": (
        "bf16",
        4096,
        {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "vocab_size": 512},
    ),
    "weights, gradients and the optimizer": (
        "fp32",
        256,
        {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 24, "vocab_size": 2048},
    ),
    "logits": ("bf16", 1024, {"vocab_size": 16384}),
}


def build(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.config(**sizes)).train()


def bytes_of(name: str) -> int:
    return memory._field("/proc/self/status", name)


def highest(dtype: str, length: int, sizes: dict[str, int], recompute: bool) -> int:
    """Return the bytes by which two steps of a training make this process grow, at their highest."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = bytes_of("VmRSS")
    model = build(**sizes)
    enable(model)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    loss, optimizer = CausalLoss(model), torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(256, (1, length))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            mean = loss(ids)["loss"]
        mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as while gradients of several forwards are summed
    return bytes_of("VmHWM") - before


@pytest.fixture(scope="module")
def grown() -> dict[str, list[int]]:
    """What each case takes with activations kept and computed again, in a process that has done nothing else."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=True, cwd=Path(tiny.__file__).parent
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_foreseen_is_about_what_is_used(grown: dict[str, list[int]], case: str, recompute: bool) -> None:
    dtype, length, sizes = CASES[case]
    shape, settings = memory.Shape.of(build(**sizes)), TuneSettings(length=length, steps=1, dtype=dtype)
    found, used = memory.foreseen(shape, settings, recompute=recompute), grown[case][recompute]
    assert 0.9 * (used - CONSTANT) <= found.total <= 1.4 * used, (found.describe(), used / memory.GIB)


def test_what_is_said_to_fit_fits() -> None:
    settings = TuneSettings(length=131072, steps=1, batch=2, per_forward=2, dtype="bf16")
    whole = memory.foreseen(LLAMA2_7B, settings).total
    with pytest.raises(
        PipelineError, match=r"^memory: got 150.00 GiB free, expected .* GiB \(weights 25.10 GiB, "
    ) as refused:
        memory.check(LLAMA2_7B, settings, 150 * memory.GIB)
    said = str(refused.value)
    length = memory.longest_that_fits(LLAMA2_7B, settings, 150 * memory.GIB)
    assert length is not None
    assert f"--length {length}" in said
    fits, not_so = (
        memory.foreseen(LLAMA2_7B, dataclasses.replace(settings, length=tokens)).total
        for tokens in (length, length + 1024)
    )
    assert fits <= 150 * memory.GIB < not_so
    assert memory.check(LLAMA2_7B, settings, whole).total == whole
    assert memory.longest_that_fits(LLAMA2_7B, settings, memory.GIB) is None
    with pytest.raises(PipelineError, match="would fit: nothing of this model"):
        memory.check(LLAMA2_7B, settings, memory.GIB)


def test_activations_are_kept_where_half_of_the_memory_holds_all() -> None:
    settings = TuneSettings(length=4096, steps=1, dtype="bf16")
    kept = memory.foreseen(LLAMA2_7B, settings, recompute=False)
    assert kept.kept > 0 == kept.checkpoints
    assert kept.total > memory.foreseen(LLAMA2_7B, settings).total
    assert not memory.recomputes(LLAMA2_7B, settings, 2 * kept.total)
    assert memory.recomputes(LLAMA2_7B, settings, 2 * kept.total - 2)


def test_ranks_share_the_frozen_weights_of_adapters() -> None:
    settings = TuneSettings(length=4096, steps=1, batch=8, dtype="bf16", lora_rank=16)
    alone, shared = (memory.foreseen(LLAMA2_7B, settings, ranks) for ranks in (1, 8))
    assert alone.weights / 8 < shared.weights < alone.weights / 4, "two layers and the embedding are whole at work"
    assert shared.gradients == pytest.approx(alone.gradients / 8, abs=8)
    whole = dataclasses.replace(settings, lora_rank=0)
    with pytest.raises(PipelineError, match="would fit: --lora-rank 16"):
        memory.check(LLAMA2_7B, whole, shared.total, 8)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    peft = pytest.importorskip("peft")
    model = build()
    shape = memory.Shape.of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.adapters(4) == sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)


def test_too_little_memory_is_said_before_the_start(
    loaded: models.LoadedModel, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope import data

    rope = lk.LongRope(256, {256: loaded.base})
    documents = list(data.documents([str(text_folder)]))
    monkeypatch.setattr(memory, "available_bytes", lambda loaded_bytes: loaded_bytes)
    with pytest.raises(PipelineError, match=r"^memory: got 0 MiB free, expected .*--overcommit tries it all the"):
        run_tuning(loaded, rope, TuneSettings(length=256, steps=1), documents, tmp_path / "run", False)
    assert not (tmp_path / "run" / "checkpoints").exists()


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # tensors this small are mapped by themselves, as those of real models are
    highest("bf16", 64, {}, False)  # what torch and the kernels take once
    print(json.dumps({case: [highest(*of, recompute) for recompute in (False, True)] for case, of in CASES.items()}))
