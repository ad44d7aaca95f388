"""Two ranks that hold the weights together train as one process does, and go on from each other's checkpoints."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import longrope_kernels as lk
from longrope import data, models
from longrope.errors import UsageError
from longrope.tune import TuneSettings
from longrope.tune.stage import run_tuning

SETTINGS = TuneSettings(length=tiny.TARGET, steps=4, batch=4, lr=1e-3, save_every=2, short_share=0.25)
ADAPTERS = dataclasses.replace(SETTINGS, lr=1e-2, lora_rank=4)


def tune(name: str, texts: str, folder: str, settings: TuneSettings, dtype: str) -> tuple[float, ...]:
    loaded = models.load(name, dtype, threads=1)
    rope = loaded.extended(lk.RopeScaling.yarn(32, 1000.0, 2.0, tiny.ORIGINAL), tiny.TARGET)
    model = loaded.model
    losses = run_tuning(loaded, rope, settings, data.documents([texts]), folder, False).losses
    for weight in model.parameters():
        assert isinstance(weight, DTensor) == dist.is_initialized(), "ranks have the weights together"
    return losses


def on_ranks(*arguments: Any) -> tuple[float, ...]:
    """As torchrun would start it."""
    place, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=place, LOCAL_RANK=place, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # looked for, and not used: the ranks have met
    return tune(*arguments)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.texts(tmp_path_factory.mktemp("ranks") / "texts", 4, 1200))


@pytest.mark.parametrize(
    ("settings", "dtype", "losses", "weights"),
    [
        pytest.param(SETTINGS, "fp32", 2e-5, 1e-4, id="all weights"),
        pytest.param(ADAPTERS, "fp32", 2e-5, 1e-4, id="adapters"),
        # Frozen weights and products in bf16, which rounds to 2^-9 of a value: of losses near 6, of weights near 1.
        pytest.param(ADAPTERS, "bf16", 2e-2, 2e-2, id="adapters of bf16 weights"),
    ],
)
def test_two_ranks_train_as_one_process_does_and_go_on_from_its_checkpoint(
    settings: TuneSettings, dtype: str, losses: float, weights: float, model_folder: Path, texts: str, tmp_path: Path
) -> None:
    if settings.lora_rank:
        pytest.importorskip("peft")
    alone, half = tmp_path / "alone", tmp_path / "half"
    kept: list[Path] = []
    real = shutil.rmtree

    def keep(path: Any, **arguments: Any) -> None:
        if Path(path) == alone / "checkpoints":
            kept.append(Path(shutil.copytree(alone, half)))
        real(path, **arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longrope.tune.stage.shutil.rmtree", keep)
        wanted = tune(str(model_folder), texts, str(alone), settings, dtype)
    assert kept
    found = ranks.run(2, on_ranks, str(model_folder), texts, str(tmp_path / "together"), settings, dtype)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(wanted, abs=losses)
    assert found[0][-1] < found[0][0] - 3 * losses, "it is a training"
    compare(alone, tmp_path / "together", weights)

    (half / "tune.json").unlink()
    real(half / "model")
    real(half / "checkpoints" / "step-00000004")
    lines = (half / "log.jsonl").read_bytes().splitlines(keepends=True)
    (half / "log.jsonl").write_bytes(b"".join(lines[:2]))
    again = ranks.run(2, on_ranks, str(model_folder), texts, str(half), settings, dtype)
    assert again[0] == pytest.approx(wanted, abs=losses)
    compare(alone, half, weights)


def compare(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=0, atol=tolerance), name


def test_what_ranks_cannot_share_is_one_line(
    loaded: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    rope = lk.LongRope(256, {256: loaded.base})
    for settings, said in (
        (SETTINGS, "--batch: got 4, expected a multiple of 3, the sequences that 3 ranks read at once"),
    ):
        with pytest.raises(UsageError, match=said):
            run_tuning(loaded, rope, settings, [], tmp_path / "run", False)
