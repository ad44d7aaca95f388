"""A fine-tuning that is killed, twice and at the worst moments, gives the bits it would have given."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Finished
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import longrope_kernels as lk
from longrope import cli, data, factors, models
from longrope.errors import PipelineError, UsageError
from longrope.tune import TuneSettings, checkpoint, memory
from longrope.tune.prepare import check_tensorboard
from longrope.tune.stage import run_tuning

STEPS = 8
SETTINGS = (
    *("--steps", str(STEPS), "--batch", "2", "--lr", "3e-3", "--warmup", "2", "--save-every", "3"),
    *("--dtype", "fp32", "--threads", "1", "--seed", "5"),
)
# Does something at the given call of a function, and goes on as before otherwise.
AT_CALL = """
import os, signal, sys
from longrope import cli, run
from longrope.tune import checkpoint

def at(module, name, number, then):
    real, calls = getattr(module, name), 0
    def function(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            then(real, *arguments)
        return real(*arguments)
    setattr(module, name, function)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(real, descriptor, content):
    real(descriptor, content[:25])
    die()

{what}
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def ladder(loaded: models.LoadedModel) -> lk.LongRope:
    """Three regimes, of which the last, with an n-hat and an attention factor, is trained under."""
    long = lk.RopeScaling.yarn(32, 1000.0, 4.0, tiny.ORIGINAL).replace(start_tokens=4)
    middle = lk.RopeScaling.ntk(32, 1000.0, 2.0)
    return lk.LongRope(tiny.ORIGINAL, {tiny.ORIGINAL: loaded.base, 192: middle, tiny.TARGET: long})


@pytest.fixture(scope="module")
def factor_file(ladder: lk.LongRope, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tune") / "factors.json"
    file.write_text(json.dumps(factors.describe(ladder, "tiny", "test")))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.texts(tmp_path_factory.mktemp("tune") / "texts", 5, 900)


@pytest.fixture(scope="module")
def asked(model_folder: Path, factor_file: Path, texts: Path) -> list[str]:
    return ["tune", str(model_folder), "--factors", str(factor_file), "--text", str(texts), *SETTINGS, "--out"]


@pytest.fixture(scope="module")
def tuned(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("tune") / "unbroken"
    cli.main([*asked, str(folder)])
    return folder


@pytest.fixture(scope="module")
def stopped_run(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle of logging its sixth step, after a checkpoint of the third."""
    folder = tmp_path_factory.mktemp("tune") / "stopped"
    killed(asked, folder, "at(run.os, 'write', 6, half)")
    return folder


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def killed(asked: list[str], folder: Path, what: str) -> None:
    """Run the command with `what` before it, which must kill it."""
    program = AT_CALL.format(what=what)
    done = subprocess.run(
        [sys.executable, "-c", program, *asked, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_it_learns(tuned: Path, model_folder: Path) -> None:
    losses = [step["loss"] for step in steps(tuned)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    rates = [step["learning_rate"] for step in steps(tuned)]
    assert rates == pytest.approx([3e-3 * share for share in (0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    before = load_file(model_folder / "model.safetensors")
    assert all(not torch.equal(before[name], weight) for name, weight in weights(tuned).items())
    told = json.loads((tuned / "tune.json").read_text())
    assert told["losses"] == losses
    assert not (tuned / "checkpoints").exists(), "the tuned model has taken their place"


def test_tensorboard_is_written_where_it_is_installed(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(number + 1, pytest.approx(step["loss"])) for number, step in enumerate(steps(tuned))]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not check_tensorboard(None)
    with pytest.raises(UsageError, match=r"^--tensorboard: got no package tensorboard, expected it installed"):
        check_tensorboard(True)


def test_killed_at_the_worst_moments_it_gives_the_same_bits(
    asked: list[str], tuned: Path, stopped: Path, command: Callable[..., Finished]
) -> None:
    folder = stopped
    assert (folder / "log.jsonl").read_bytes().count(b"\n") == 5
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    killed(asked, folder, "at(checkpoint, 'checksum', 4, die)")  # reads two, then writes the second checkpoint
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".step-00000006.part", "step-00000003"]
    assert steps(folder) == steps(tuned)[:6]

    done = command(*asked, folder)
    assert (done.code, done.err) == (0, "")
    assert "going on from step 3 of 8" in done.out
    assert "its loss is" not in done.out, "steps done again gave what was logged"
    assert steps(folder) == steps(tuned)
    ours, theirs = weights(folder), weights(tuned)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    again = command(*asked, folder)
    assert again.code == 0
    assert steps(folder) == steps(tuned), "a finished training is not done again"


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_computed_again_give_the_bits_of_activations_kept(
    asked: list[str], tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    enabled = []
    monkeypatch.setattr(memory, "recomputes", lambda *arguments: recompute)
    real = LlamaForCausalLM.activation_checkpointing_enable
    monkeypatch.setattr(
        LlamaForCausalLM,
        "activation_checkpointing_enable",
        lambda self, *arguments, **named: (enabled.append(self), real(self, *arguments, **named)),
    )
    cli.main([*asked, str(tmp_path / "run")])
    assert bool(enabled) == recompute
    assert steps(tmp_path / "run") == steps(tuned)
    expected, found = weights(tuned), weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_in_a_checkpoint_is_pickled(stopped: Path) -> None:
    files = [file for file in (stopped / "checkpoints").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {
        *("weights.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json")
    }
    for file in files:
        assert load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())


def test_the_result_is_a_base_for_more(tuned: Path, ladder: lk.LongRope, texts: Path, tmp_path: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tuned / "model")
    assert stock.config.rope_parameters["rope_type"] == "longrope"
    assert stock.config.rope_parameters["long_factor"] == list(ladder.scalings[-1].rescale_factors)
    again = models.load(str(tuned / "model"), "fp32")
    assert again.rope == ladder
    assert (again.base, again.original_length) == (ladder.scalings[-1], tiny.TARGET)

    further = again.extended(again.base.replace(rescale_factors=[8.0] * 16), 512)
    documents = data.documents([str(texts)])
    settings = TuneSettings(length=384, steps=1)
    result = run_tuning(again, further, settings, documents, tmp_path / "further", tensorboard=False)
    reloaded = models.load(str(result.model), "fp32")
    assert reloaded.rope == further
    assert reloaded.rope.lengths == (*ladder.lengths, 512)


def test_sequences_are_trained_on_under_the_long_regime_whatever_their_length(
    loaded: models.LoadedModel, ladder: lk.LongRope, texts: Path, tmp_path: Path
) -> None:
    """The first loss is that of the model under the last regime alone, at a length that other regimes serve."""
    from longrope.loss import token_nll
    from longrope.tune.data import Segments

    fresh = models.load(loaded.name, "fp32")
    documents = list(data.documents([str(texts)]))
    result = run_tuning(fresh, ladder, TuneSettings(length=96, steps=1), documents, tmp_path / "run", False)
    ids = torch.tensor(Segments(loaded.tokenizer, documents, 96).tokens(0))
    loaded.use(lk.LongRope(tiny.TARGET, {tiny.TARGET: ladder.scalings[-1]}))
    wanted = token_nll(loaded.model, ids).mean()
    loaded.use(ladder)
    other = token_nll(loaded.model, ids).mean()
    assert result.losses[0] == pytest.approx(float(wanted), abs=1e-5)
    assert abs(float(other - wanted)) > 1e-3


def test_a_corrupt_checkpoint_is_named_and_refused(
    stopped: Path, asked: list[str], command: Callable[..., Finished]
) -> None:
    kept = stopped / "checkpoints" / "step-00000003"
    for name, spoil in (
        ("weights.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-64])),
        ("optimizer.safetensors", flip),
        ("state.json", lambda file: file.write_text(file.read_text()[:-9])),
        ("trainer_state.json", lambda file: file.unlink()),
    ):
        whole = (kept / name).read_bytes()
        spoil(kept / name)
        done = command(*asked, stopped)
        assert done.code == 1
        assert done.err.startswith(f"longrope: {kept}: got a broken checkpoint ("), done.err
        assert done.err.count("\n") == 1
        (kept / name).write_bytes(whole)
    log = stopped / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[1:]))
    done = command(*asked, stopped)
    assert done.err.startswith(f"longrope: {log}: got no line for step 1, expected one for each up to step 3")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_folder_serves_one_training(stopped: Path, asked: list[str], command: Callable[..., Finished]) -> None:
    changed = [*asked[:-1], "--lr", "1e-3", "--out"]
    done = command(*changed, stopped)
    assert done.code == 2
    assert done.err.startswith(f"longrope: --lr: got 0.001 in {stopped}, expected 0.003, with which")


def test_a_loss_that_diverges_stops_with_what_was_kept(
    loaded: models.LoadedModel, ladder: lk.LongRope, texts: Path, tmp_path: Path
) -> None:
    fresh = models.load(loaded.name, "fp32")
    settings = TuneSettings(length=128, steps=40, lr=30.0, schedule="constant", save_every=1, max_grad_norm=0.0)
    with pytest.raises(PipelineError, match=r"training: got .* at step \d+, expected .*; the checkpoint .* is kept"):
        run_tuning(fresh, ladder, settings, data.documents([str(texts)]), tmp_path / "run", False)
    kept = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept / "weights.safetensors").values())


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_is_kept(
    stopped: Path, asked: list[str], tuned: Path, command: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        done = command(*asked, stopped)
    folder = stopped / "checkpoints"
    assert (done.code, done.err) == (
        1,
        f"longrope: {folder / 'step-00000006'}: got a full disk, expected free space; the checkpoint step-00000003 is "
        "kept, run the same command again\n",
    )
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    shutil.rmtree(folder)  # and without any checkpoint it begins anew, to the same end
    assert command(*asked, stopped).code == 0
    assert steps(stopped) == steps(tuned)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 8}, "--length: got 8, expected an int >= 64"),
        ({"lr": float("nan")}, "--lr: got nan, expected a finite number >= 0"),
        ({"schedule": "warm"}, "--schedule: got warm, expected one of linear, constant, cosine"),
        ({"batch": 3, "per_forward": 2}, "--per-forward: got 2, expected a divisor of the 3 sequences of a step"),
        ({"stop_above": 1.0}, "--stop-above: got 1.0, expected a multiple above 1"),
        ({"dtype": "fp16"}, "--dtype: got fp16, expected one of auto, bf16, fp32"),
    ],
)
def test_wrong_settings_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        TuneSettings(**{"length": 128, "steps": 10, **changes})
    assert str(refused.value) == said
