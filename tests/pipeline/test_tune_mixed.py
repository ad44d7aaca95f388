"""LongRoPE2's mixed training: short windows are read as the original model reads them, long ones as the extended."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tune_data import Marked, corpus

import longrope_kernels as lk
from longrope import data, models
from longrope.errors import UsageError
from longrope.loss import token_nll
from longrope.tune import TuneSettings
from longrope.tune.data import MixedWindows, Segments
from longrope.tune.loss import CausalLoss
from longrope.tune.prepare import rows, training_rope
from longrope.tune.stage import run_tuning
from longrope_kernels.integrations.transformers import enable

LONG, SHORT = 256, 96


@pytest.fixture(scope="module")
def ladder(loaded: models.LoadedModel) -> lk.LongRope:
    return loaded.extended(lk.RopeScaling.yarn(32, 1000.0, 2.0, tiny.ORIGINAL), LONG)


@given(share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7]), windows=st.integers(1, 3))
def test_shorts_are_spread_evenly_and_no_sequence_is_skipped(share: float, windows: int) -> None:
    documents = corpus([300, 70, 200, 31])
    long, short = Segments(Marked(), documents, 64 * windows + 9), Segments(Marked(), documents, 64, "short")
    mixed = MixedWindows(long, short, share)
    found = [mixed[number] for number in range(40)]
    shorts = [item for item in found if "cu_seqlens" in item]
    assert len(shorts) == int(40 * share + 1e-9)
    longs = [item["input_ids"].tolist() for item in found if "cu_seqlens" not in item]
    assert longs == [long.tokens(number) for number in range(len(longs))]
    tokens = [token for item in shorts for token in item["input_ids"].tolist()]
    assert tokens == [token for number in range(len(shorts) * windows) for token in short.tokens(number)]
    for item in shorts:
        assert item["cu_seqlens"][-1] == len(item["input_ids"]) == 64 * windows
        starts = item["cu_seqlens"][:-1]
        assert (item["input_ids"][starts] == 1).all(), "every text begins with BOS"
        assert (item["input_ids"][starts[1:] - 1] == 2).all(), "and ends with EOS"


def test_both_kinds_have_the_loss_of_their_own_regime(loaded: models.LoadedModel, ladder: lk.LongRope) -> None:
    settings = TuneSettings(length=LONG, steps=1, batch=2, short_share=0.5, short_length=SHORT)
    drawn = corpus([5, 4, 9, 6, 14, 30, 3])
    mixed = rows(loaded.tokenizer, drawn, settings)
    long, short = mixed[0], mixed[1]
    loaded.stock()
    enable(loaded.model, training_rope(ladder, settings))
    with torch.no_grad():
        losses = [
            CausalLoss(loaded.model)(**{k: v.unsqueeze(0) for k, v in item.items()})["loss"] for item in (long, short)
        ]
    loaded.stock()  # the original model, one text at a time
    bounds = short["cu_seqlens"].tolist()
    assert len(bounds) > 4, "several texts in the row"
    texts = [short["input_ids"][start:stop] for start, stop in pairwise(bounds)]
    wanted = torch.cat([token_nll(loaded.model, text) for text in texts])
    assert float(losses[1]) == pytest.approx(float(wanted.mean()), abs=1e-5)
    loaded.use(lk.LongRope(LONG, {LONG: ladder.scalings[-1]}))
    assert float(losses[0]) == pytest.approx(float(token_nll(loaded.model, long["input_ids"]).mean()), abs=1e-5)


def test_a_mixed_run_goes_on_where_it_stopped(loaded: models.LoadedModel, ladder: lk.LongRope, tmp_path: Path) -> None:
    documents = list(data.documents([str(tiny.texts(tmp_path / "texts", 4, 900))]))
    settings = TuneSettings(length=LONG, steps=4, batch=2, lr=1e-3, short_share=0.25, save_every=2)
    straight = run_tuning(models.load(loaded.name, "fp32"), ladder, settings, documents, tmp_path / "one", False)

    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longrope.tune.stage.export_checkpoint", stop)
        with pytest.raises(Stopped):
            run_tuning(models.load(loaded.name, "fp32"), ladder, settings, documents, tmp_path / "two", False)
    (tmp_path / "two" / "checkpoints" / "step-00000004").rename(tmp_path / "away")
    again = run_tuning(models.load(loaded.name, "fp32"), ladder, settings, documents, tmp_path / "two", False)
    assert again.losses == straight.losses
    weights = [(result.model / "model.safetensors").read_bytes() for result in (straight, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"short_share": 1.0}, "--short-share: got 1.0, expected a share from 0 to below 1"),
        ({"short_share": 0.5, "short_length": 200}, "--short-length: got 200, expected at least 64, at most 128"),
        ({"short_share": 0.5, "batch": 2, "per_forward": 2}, "--per-forward: got 2, expected 1 beside --short-share"),
    ],
)
def test_wrong_settings_are_one_line(
    loaded: models.LoadedModel, ladder: lk.LongRope, tmp_path: Path, changes: dict[str, float], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        run_tuning(loaded, ladder, TuneSettings(**{"length": LONG, "steps": 1, **changes}), [], tmp_path / "run")
