"""What a training needs before it starts: settings complete, rows to read, the rope to train under, memory, loggers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import longrope_kernels as lk

from .. import models
from ..data import Document
from ..errors import refuse
from ..progress import say
from ..team import rank
from . import memory
from .data import MixedWindows, Segments
from .lora import check_peft
from .settings import TuneSettings


def resolve(settings: TuneSettings, loaded: models.LoadedModel, rope: lk.LongRope) -> TuneSettings:
    """Return the settings with what depends on the model said, after checking it."""
    _, count = rank()
    at_once = settings.per_forward * count
    if settings.batch % at_once:
        refuse("--batch", settings.batch, f"a multiple of {at_once}, the sequences that {count} ranks read at once")
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


def check_memory(model: Any, settings: TuneSettings, overcommit: bool, count: int = 1) -> bool:
    """Say what memory is foreseen; refuse where there is less. Return whether activations are to be recomputed."""
    shape = memory.Shape.of(model)
    available = memory.share_of_memory(shape.weight_bytes, count)
    if not overcommit:
        memory.check(shape, settings, available, count)
    recompute = memory.recomputes(shape, settings, available, count)
    wanted = memory.foreseen(shape, settings, count, recompute=recompute)
    say(f"memory foreseen: {wanted.describe()}, of {memory.said(available)}")
    return recompute


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
