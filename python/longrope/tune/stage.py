"""The fine-tuning stage: train under one regime of a ladder, resumably, and export what stock transformers loads."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

import longrope_kernels as lk
from longrope_kernels.integrations.transformers import enable

from .. import models
from ..context import versions
from ..data import Document
from ..errors import PipelineError
from ..export.checkpoint import export_checkpoint
from ..progress import say, task
from ..run import EvaluationLog, RunDirectory, digest, now, read_json
from ..team import rank
from . import checkpoint, ranks
from .data import MixedWindows, Segments
from .lora import Adapters
from .loss import CausalLoss
from .prepare import cast, check_memory, check_tensorboard, resolve, rows, tensorboard_callbacks, training_rope
from .settings import TuneSettings
from .trainer import LongTrainer, Recorder, arguments

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
        loaded: trained in place: afterwards its weights are the tuned ones, in its dtype. (Under torchrun on rank 0
            alone; the other ranks' models are spent.)
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
    place, count = rank()
    ranks.join(place, count)
    args = arguments(settings, folder / "checkpoints", count)
    with _opened(folder, asked) if place == 0 else nullcontext() as run:
        start = -1 if run is None else _start(run, settings)
        start = ranks.agreed(start, args.device)
        if start < settings.steps or not (folder / "tune.json").is_file():
            recompute = bool(ranks.agreed(check_memory(loaded.model, settings, overcommit, count), args.device))
            training = _Training(loaded, rope, settings, sequences, args, folder, digest(asked), recompute)
            training.train(start, None if run is None else run.evaluations, tensorboard)
            if run is not None:
                training.finish(run)
        ranks.meet()
        done = read_json(folder / "tune.json")
        return TuneResult(folder, folder / "model", rope, tuple(done["losses"]), done["seconds"])


def _opened(folder: Path, asked: dict[str, Any]) -> Any:
    return closing(RunDirectory(folder, asked, {"versions": versions()}, log="log.jsonl"))


def _start(run: RunDirectory, settings: TuneSettings) -> int:
    """Return how many steps are done."""
    if run.read_json("tune.json") is not None and (run.path / "model" / "config.json").is_file():
        return settings.steps
    (run.path / "tune.json").unlink(missing_ok=True)
    latest, log = checkpoint.latest(run.path / "checkpoints"), run.evaluations
    done = 0 if latest is None else checkpoint.step_of(latest)
    if missing := [step for step in range(1, done + 1) if str(step) not in log.records]:
        raise PipelineError(f"{log.path}: got no line for step {missing[0]}, expected one for each up to step {done}")
    if latest is not None:
        say(f"{run.path}: going on from step {done} of {settings.steps}")
    return done


@dataclass
class _Training:
    """One training, on this rank."""

    loaded: models.LoadedModel
    rope: lk.LongRope
    settings: TuneSettings
    sequences: Segments | MixedWindows
    args: TrainingArguments
    folder: Path
    fingerprint: str
    recompute: bool

    def train(self, start: int, log: EvaluationLog | None, tensorboard: bool) -> None:
        """Train from step `start` to the end, and leave the tuned weights in the model.

        Args:
            log: of the steps; rank 0 alone has it.
        """
        model, device = self.loaded.model, self.loaded.model.device
        dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
        self.loaded.stock()
        adapters = self._adapters(model)
        if adapters is None:
            cast(model, dict.fromkeys(dtypes, torch.float32))
        enable(model, training_rope(self.rope, self.settings))
        if self.recompute:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        trained = CausalLoss(model)
        if self.args.world_size > 1:
            ranks.shard(trained, self.args.device)
        try:
            self._run(trained, start, log, tensorboard)
            if adapters is not None and not ranks.is_sharded(trained):
                adapters.merge()
                adapters = None
        finally:
            if adapters is not None and not ranks.is_sharded(trained):
                adapters.remove()
            self.loaded.stock()
            model.activation_checkpointing_disable()
            model.zero_grad(set_to_none=True)
            model.eval()
            if not ranks.is_sharded(trained):
                model.to(device)
                cast(model, dtypes)

    def _run(self, trained: CausalLoss, start: int, log: EvaluationLog | None, tensorboard: bool) -> None:
        settings, checkpoints = self.settings, self.folder / "checkpoints"
        with task(f"tune at {settings.length:,} tokens", settings.steps) as progress:
            progress.skip(start)
            callbacks: tuple[TrainerCallback, ...] = ()
            if log is not None:
                tokens = settings.length * settings.batch
                callbacks = (Recorder(log, progress, settings.stop_above, checkpoints, tokens, start),)
                if tensorboard:
                    callbacks += tensorboard_callbacks(self.folder / "tensorboard", start)
            trainer = LongTrainer(trained, self.sequences, self.args, checkpoints, self.fingerprint, callbacks)
            trainer.train(resume_from_checkpoint=str(checkpoint.folder_of(checkpoints, start)) if start else None)

    def _adapters(self, model: Any) -> Adapters | None:
        return Adapters(model, self.settings.lora_rank, self.settings.seed) if self.settings.lora_rank else None

    def finish(self, run: RunDirectory) -> None:
        """Write the tuned model and what is known of it; the checkpoints are no longer needed."""
        settings, records = self.settings, run.evaluations.records
        checkpoints = self.folder / "checkpoints"
        if self.args.world_size > 1:  # this rank has a part of the weights; the last checkpoint has all
            model = self.loaded.model = models.load(self.loaded.name, self.loaded.dtype).model
            last = checkpoint.Checkpoint(checkpoint.folder_of(checkpoints, settings.steps), self.fingerprint)
            dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
            adapters = self._adapters(model)
            trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            last.into_model({f"model.{name}": weight for name, weight in trained.items()})
            if adapters is not None:
                adapters.merge()
            cast(model, dtypes)
        steps = [records[str(step)] for step in range(1, settings.steps + 1)]
        result = {
            "format": FORMAT,
            "settings": dataclasses.asdict(settings),
            "model": self.loaded.name,
            "rope": self.rope.to_dict(),
            "losses": [step["loss"] for step in steps],
            "seconds": round(sum(step["seconds"] for step in steps), 3),
            "documents": self.sequences.fingerprint(),
            "provenance": {"created": now(), **run.settings, **versions()},
        }
        export_checkpoint(self.loaded, self.rope, self.folder / "model", tuned=result)
        run.write_json("tune.json", result)
        shutil.rmtree(checkpoints, ignore_errors=True)
