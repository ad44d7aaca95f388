"""Low-rank adapters: only they are trained and kept in checkpoints, and the merged model is the adapted one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import longrope_kernels as lk
from longrope import data, models
from longrope.errors import UsageError
from longrope.loss import token_nll
from longrope.tune import TuneSettings, lora
from longrope.tune.stage import run_tuning

SETTINGS = TuneSettings(length=tiny.TARGET, steps=4, batch=2, lr=1e-2, lora_rank=4, save_every=2)


@pytest.fixture(scope="module")
def ladder(loaded: models.LoadedModel) -> lk.LongRope:
    return loaded.extended(lk.RopeScaling.yarn(32, 1000.0, 2.0, tiny.ORIGINAL), tiny.TARGET)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[data.Document]:
    return list(data.documents([str(tiny.texts(tmp_path_factory.mktemp("lora") / "texts", 4, 900))]))


def tune(name: str, ladder: lk.LongRope, texts: list[data.Document], folder: Path, dtype: str = "fp32") -> Any:
    return run_tuning(models.load(name, dtype), ladder, SETTINGS, texts, folder, False)


def test_adapters_alone_are_trained_and_merged(
    loaded: models.LoadedModel, ladder: lk.LongRope, texts: list[data.Document], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    seen: dict[str, torch.Tensor] = {}
    adapted: list[torch.Tensor] = []
    ids = torch.arange(200) * 7 % 97
    real = lora.Adapters.merge

    def merge(self: lora.Adapters) -> None:
        seen.update(load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "weights.safetensors"))
        adapted.append(token_nll(self.model.eval(), ids))
        real(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lora.Adapters, "merge", merge)
        result = tune(loaded.name, ladder, texts, tmp_path / "run")
    assert result.losses[-1] < result.losses[0] - 0.05
    assert seen
    assert all("lora_A" in name or "lora_B" in name for name in seen)
    before = load_file(Path(loaded.name) / "model.safetensors")
    after = load_file(result.model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {name for name in before if "_proj" in name}
    merged = models.load(str(result.model), "fp32")
    assert torch.allclose(token_nll(merged.model, ids), adapted[0], atol=1e-4)


def test_an_adapted_run_goes_on_where_it_stopped(
    loaded: models.LoadedModel, ladder: lk.LongRope, texts: list[data.Document], tmp_path: Path
) -> None:
    """In bf16: the frozen weights stay in it, the adapters are float32."""
    pytest.importorskip("peft")
    straight = tune(loaded.name, ladder, texts, tmp_path / "one", "bf16")
    broken = models.load(loaded.name, "bf16")
    weights = {name: weight.clone() for name, weight in broken.model.named_parameters()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lora.Adapters, "merge", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_tuning(broken, ladder, SETTINGS, texts, tmp_path / "two", False)
    for name, weight in broken.model.named_parameters():
        assert torch.equal(weight, weights[name]), "a run that fails leaves the model without adapters"
        assert weight.requires_grad
    (tmp_path / "two" / "checkpoints" / "step-00000004").rename(tmp_path / "away")
    again = tune(loaded.name, ladder, texts, tmp_path / "two", "bf16")
    assert again.losses == straight.losses
    models_of = [(result.model / "model.safetensors").read_bytes() for result in (straight, again)]
    assert models_of[0] == models_of[1]


def test_without_peft_it_is_one_line(
    loaded: models.LoadedModel, ladder: lk.LongRope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    with pytest.raises(UsageError, match=r"^--lora-rank: got no package peft, expected it installed"):
        run_tuning(loaded, ladder, SETTINGS, [], tmp_path / "run", False)
    assert not (tmp_path / "run").exists()
