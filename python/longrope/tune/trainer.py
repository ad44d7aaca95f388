"""transformers' Trainer with sequences in order, checkpoints without pickle, and losses that are logged at once."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import PipelineError
from ..progress import Task, say
from ..run import EvaluationLog
from . import checkpoint, ranks
from .loss import CausalLoss
from .settings import TuneSettings

SMOOTHING = 0.9  # of the loss that is watched: about ten steps
SCHEDULERS = {"linear": "linear", "constant": "constant_with_warmup", "cosine": "cosine"}


class LongTrainer(Trainer):
    """Trainer of a `CausalLoss`.

    Args:
        trained: the model whose forward is its loss.
        sequences: with as many items as the run reads, in order.
        args: what `arguments` makes of the settings.
        folder: of the checkpoints.
        fingerprint: digest of all that decides results; checkpoints of another are refused.
        callbacks: told of every step.
    """

    def __init__(
        self,
        trained: CausalLoss,
        sequences: Dataset[Any],
        args: TrainingArguments,
        folder: Path,
        fingerprint: str,
        callbacks: tuple[TrainerCallback, ...] = (),
    ) -> None:
        self.checkpoints, self.fingerprint = folder, fingerprint
        self._resumed: checkpoint.Checkpoint | None = None
        super().__init__(model=trained, args=args, train_dataset=sequences, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name."""
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = {**dataclasses.asdict(self.state), "log_history": [], "stateful_callbacks": {}}
        checkpoint.save(
            self.checkpoints,
            self.state.global_step,
            self.trained,
            self.optimizer,
            self.lr_scheduler,
            json.dumps(state, indent=1, sort_keys=True),
            self.fingerprint,
            self.args.should_save,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = checkpoint.Checkpoint(Path(resume_from_checkpoint), self.fingerprint)
        self._resumed.into_model(self.trained)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            self._resumed.into_optimizer(self.trained, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            self._resumed.into_random()
            self._resumed = None  # and with it a copy of the weights

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return ranks.whole(norm) if isinstance(norm, torch.Tensor) else norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        ranks.set_gradient_sync(self.model, False)
        try:
            yield
        finally:
            ranks.set_gradient_sync(self.model, True)


class Recorder(TrainerCallback):
    """Logs every step as it is done, shows progress, and stops a run that diverges.

    Steps that a killed run had logged beyond its last checkpoint are done again; the log keeps the first record, and a
    loss that differs from it is said.

    Args:
        log: a record per step, by its number.
        progress: one unit a step.
        stop_above: see `TuneSettings`.
        checkpoints: their folder.
        tokens: that a step reads.
    """

    def __init__(
        self, log: EvaluationLog, progress: Task, stop_above: float, checkpoints: Path, tokens: int, start: int = 0
    ) -> None:
        self.log, self.progress, self.stop_above, self.checkpoints = log, progress, stop_above, checkpoints
        self.tokens = tokens
        self.watch = Watch()
        self.differs = False
        for step in range(1, start + 1):
            self.watch.add(log.records[str(step)]["loss"])
        self._began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Record a step."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        step, loss = state.global_step, float(logs["loss"])
        norm = float(logs.get("grad_norm", 0.0))
        now = time.monotonic()
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            self._diverged(f"{what} {loss if what == 'loss' else norm} at step {step}", "a finite one")
        smoothed, least = self.watch.add(loss)
        if smoothed > self.stop_above * least:
            self._diverged(
                f"a smoothed loss of {smoothed:.4f} at step {step}",
                f"at most {self.stop_above:g} times its least value, {least:.4f}",
            )
        fields = {"loss": loss, "grad_norm": norm, "learning_rate": float(logs["learning_rate"])}
        fields |= {"tokens": step * self.tokens, "seconds": round(now - self._began, 3)}
        self._began = now
        before = self.log.append_once(str(step), fields)
        if before["loss"] != loss and not self.differs:
            self.differs = True
            say(
                f"step {step}: its loss is {loss!r} now and was {before['loss']!r} before the run was interrupted: "
                "another machine, number of threads or version rounds differently"
            )
        self.progress.advance(1, f"step {step}, loss {loss:.4f}")

    def _diverged(self, got: str, expected: str) -> None:
        kept = checkpoint.latest(self.checkpoints)
        said = f"the checkpoint {kept} is kept" if kept else "no checkpoint was made yet"
        raise PipelineError(f"training: got {got}, expected {expected}; {said} (a smaller --lr or a --warmup may help)")


class Watch:
    """The loss, smoothed, and the least value that had."""

    def __init__(self) -> None:
        self.count, self.sum, self.least = 0, 0.0, math.inf

    def add(self, loss: float) -> tuple[float, float]:
        """Take in a loss; return the smoothed loss now and the least so far."""
        self.count += 1
        self.sum = SMOOTHING * self.sum + (1 - SMOOTHING) * loss
        smoothed = self.sum / (1 - SMOOTHING**self.count)
        self.least = min(self.least, smoothed)
        return smoothed, self.least


def arguments(settings: TuneSettings, folder: Path, count: int = 1) -> TrainingArguments:
    """Return the trainer's arguments for these settings; where there are several ranks, they meet here.

    Args:
        settings: see `TuneSettings`; `dtype` is bf16 or fp32.
        folder: of the checkpoints.
        count: ranks.
    """
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.per_forward,
        gradient_accumulation_steps=settings.batch // (settings.per_forward * count),
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULERS[settings.schedule],
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bf16",
        use_cpu=not cuda,
        ddp_backend=None if cuda or count == 1 else "gloo",
        dataloader_pin_memory=cuda,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_only_model=True,  # as far as transformers would; `_save_checkpoint` writes all
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:  # of one process: torch's DataParallel is not what a step's batch was meant for
        args._n_gpu = 1
    return args
