"""The fine-tuning stage: train under one regime of a ladder, resumably, and export what stock transformers loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import enable

from .. import models
from ..context import versions
from ..data import Document
from ..errors import PipelineError, refuse
from ..export.checkpoint import export_checkpoint
from ..progress import say, task
from ..run import RunDirectory, digest, now
from . import checkpoint, memory
from .data import MixedWindows, Segments
from .lora import Adapters, check_peft
from .loss import CausalLoss
from .settings import TuneSettings
from .trainer import LongTrainer, Recorder

FORMAT = "longrope-tune/1"


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tuning left behind.

    Attributes:
        folder: of the stage: `log.jsonl`, `tune.json`, TensorBoard's files.
        model: the tuned model, which stock transformers and `models.load` load.
        rope: the ladder it was tuned under the last regime of.
        losses: of every step, in nats a token.
        seconds: of training, over all runs it took.
    """

    folder: Path
    model: Path
    rope: lk.LongRope
    losses: tuple[float, ...]
    seconds: float


def run_tuning(
    loaded: models.LoadedModel,
    rope: lk.LongRope,
    settings: TuneSettings,
    documents: Iterable[Document],
    folder: str | Path,
    tensorboard: bool | None = None,
    overcommit: bool = False,
) -> TuneResult:
    """Fine-tune a model under the last regime of a ladder and write it to `folder`/model.

    Every sequence is trained on under that regime, whatever its length. The folder serves one training: started again
    after an interruption, a run goes on from its last checkpoint and gives the losses and weights it would have given,
    bit for bit on the same machine, threads and versions; a finished one is returned as it is.

    Args:
        loaded: trained in place: afterwards its weights are the tuned ones, in its dtype.
        rope: the ladder of the result.
        settings: what decides the result besides the model and the documents.
        documents: to train on, see `longrope.data.training`.
        tensorboard: write TensorBoard's files; None: where it is installed.
        overcommit: start where the memory foreseen is more than there is, too.

    Raises:
        UsageError: a wrong argument, another training's folder, or text that cannot fill a sequence; one line.
        PipelineError: too little memory is foreseen, and the line says what would fit; a broken checkpoint, a full
            disk, or a loss that diverges, and it says what is kept.
    """
    folder = Path(folder)
    settings = resolve(settings, loaded, rope)
    tensorboard = check_tensorboard(tensorboard)
    sequences = rows(loaded.tokenizer, documents, settings)
    asked = {
        **dataclasses.asdict(settings),
        "model": loaded.name,
        "model_fingerprint": models.fingerprint(loaded.source),
        "model_dtype": loaded.dtype,
        "factors": digest(rope.to_dict()),
        "text": sequences.fingerprint(),
    }
    fingerprint = digest(asked)
    with closing(RunDirectory(folder, asked, {"versions": versions()}, log="log.jsonl")) as run:
        done = run.read_json("tune.json")
        if done is None or not (folder / "model" / "config.json").is_file():
            check_memory(loaded.model, settings, overcommit)
            done = _train(loaded, rope, settings, sequences, run, fingerprint, tensorboard)
        return TuneResult(folder, folder / "model", rope, tuple(done["losses"]), done["seconds"])


def _train(
    loaded: models.LoadedModel,
    rope: lk.LongRope,
    settings: TuneSettings,
    sequences: Segments | MixedWindows,
    run: RunDirectory,
    fingerprint: str,
    tensorboard: bool,
) -> dict[str, Any]:
    log, folder = run.evaluations, run.path / "checkpoints"
    start = checkpoint.latest(folder)
    done = 0 if start is None else checkpoint.step_of(start)
    if missing := [step for step in range(1, done + 1) if str(step) not in log.records]:
        raise PipelineError(f"{log.path}: got no line for step {missing[0]}, expected one for each up to step {done}")
    if start is not None:
        say(f"{run.path}: going on from step {done} of {settings.steps}")
    model, device = loaded.model, loaded.model.device
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    loaded.stock()
    adapters = Adapters(model, settings.lora_rank, settings.seed) if settings.lora_rank else None
    if adapters is None:
        cast(model, dict.fromkeys(dtypes, torch.float32))
    enable(model, training_rope(rope, settings))
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    try:
        with task(f"tune at {settings.length:,} tokens", settings.steps) as progress:
            progress.skip(done)
            callbacks = tensorboard_callbacks(run.path / "tensorboard", done) if tensorboard else ()
            recorder = Recorder(log, progress, settings.stop_above, folder, settings.length * settings.batch, done)
            trainer = LongTrainer(CausalLoss(model), sequences, settings, folder, fingerprint, recorder, callbacks)
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        if adapters is not None:
            adapters.merge()
            adapters = None
    finally:
        if adapters is not None:
            adapters.remove()
        loaded.stock()
        model.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval().to(device)
        cast(model, dtypes)
    steps = [log.records[str(step)] for step in range(1, settings.steps + 1)]
    result = {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        "model": loaded.name,
        "rope": rope.to_dict(),
        "losses": [step["loss"] for step in steps],
        "seconds": round(sum(step["seconds"] for step in steps), 3),
        "documents": sequences.fingerprint(),
        "provenance": {"created": now(), "from": loaded.name, **run.settings, **versions()},
    }
    export_checkpoint(loaded, rope, run.path / "model", tuned=result)
    run.write_json("tune.json", result)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def resolve(settings: TuneSettings, loaded: models.LoadedModel, rope: lk.LongRope) -> TuneSettings:
    """Return the settings with what depends on the model said, after checking it."""
    if settings.lora_rank:
        check_peft()
    short = settings.short_length
    if settings.short_share:
        short = rope.lengths[0] if short is None else short
        if not 64 <= short <= min(rope.lengths[0], settings.length - 1):
            expected = f"at least 64, at most {rope.lengths[0]}, the first regime's, and below {settings.length}"
            refuse("--short-length", short, expected)
    dtype = compute_dtype(settings.dtype, loaded.dtype)
    return dataclasses.replace(settings, dtype=dtype, short_length=short if settings.short_share else None)


def check_memory(model: Any, settings: TuneSettings, overcommit: bool) -> None:
    """Say what memory is foreseen; refuse where there is less."""
    shape = memory.Shape.of(model)
    available = memory.available_bytes(shape.weight_bytes)
    wanted = memory.foreseen(shape, settings) if overcommit else memory.check(shape, settings, available)
    say(f"memory foreseen: {wanted.describe()}, of {available / memory.GIB:.1f} GiB")


def rows(tokenizer: Any, documents: Iterable[Document], settings: TuneSettings) -> Segments | MixedWindows:
    """Return what the run reads, in order."""
    long = Segments(tokenizer, documents, settings.length, settings.seed, settings.batch * settings.steps)
    if settings.short_length is None:
        return long
    short = Segments(tokenizer, long.documents, settings.short_length, f"{settings.seed} short")
    return MixedWindows(long, short, settings.short_share)


def training_rope(rope: lk.LongRope, settings: TuneSettings) -> lk.LongRope:
    """Return the last regime for long sequences, whatever their length, and the first for short windows."""
    regimes = {settings.length: rope.scalings[-1]}
    if settings.short_length is not None:
        regimes[settings.short_length] = rope.scalings[0]
    return lk.LongRope(min(regimes), regimes)


def compute_dtype(asked: str, weights: str) -> str:
    """Return the dtype of the computation, bf16 or fp32, where it is asked as `auto` of a model in `weights`."""
    if asked != "auto":
        return asked
    return "fp32" if weights == "fp32" else "bf16"


def cast(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Change the dtype of weights, by name; buffers (a rotary embedding's frequencies) stay as they are."""
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes[name])


def check_tensorboard(asked: bool | None) -> bool:
    """Whether TensorBoard's files will be written: where it is asked for, or not spoken of and installed."""
    there = importlib.util.find_spec("tensorboard") is not None
    if asked and not there:
        refuse("--tensorboard", "no package tensorboard", "it installed (pip install tensorboard)")
    return there if asked is None else asked


def tensorboard_callbacks(folder: Path, start: int) -> tuple[TrainerCallback, ...]:
    """Return what writes TensorBoard's files; steps after `start`, of a run that was killed, give way to new ones."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return (TensorBoardCallback(SummaryWriter(str(folder), purge_step=start + 1)),)
