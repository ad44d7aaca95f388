"""What a fine-tuning will need in memory, before it starts, and what would fit where it does not.

    weights      float32; frozen ones in their own dtype, adapters beside them
    gradients    float32, of what is trained
    optimizer    two float32 moments of what is trained
    casts        in bf16: a copy of the weights, which autocast keeps through a forward
    checkpoints  the float32 input of every layer, kept for the backward pass
    layer        what the backward pass of one layer holds: its activations, computed again, and their gradients
    kept         instead of checkpoints, where they take less than half of the memory: the activations of every layer,
                 which saves the second forward, about a quarter of the time
    loss         the logits of a chunk of positions several times over, and the gradient of the head

tests/pipeline/test_tune_memory.py holds the sum to 0.9 to 1.4 times the measured peak, with tensors that the C library
maps each by itself, as it does from 32 MiB on; of smaller ones the heap's fragments come on top.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PipelineError
from ..loss import CHUNK_BYTES
from .settings import TuneSettings

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on.

    Attributes:
        weights: parameters, tied ones once.
        weight_bytes: what they take as they are loaded.
        query, key: query_heads and key_heads times head_dim.
    """

    weights: int
    weight_bytes: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Read the sizes of a transformers model."""
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weights = list(model.parameters())
        return cls(
            weights=sum(weight.numel() for weight in weights),
            weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=config.num_attention_heads * head_dim,
            key=config.num_key_value_heads * head_dim,
            vocabulary=config.vocab_size,
        )

    def adapters(self, rank: int) -> int:
        """Parameters of adapters of that rank in every linear layer of a plain decoder."""
        attention = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key)
        return rank * self.layers * (attention + 3 * (self.hidden + self.intermediate))


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    checkpoints: int
    kept: int
    layer: int
    loss: int

    @property
    def total(self) -> int:
        """All of it, at its highest."""
        return sum(dataclasses.astuple(self))

    def describe(self) -> str:
        """Return the parts as a line."""
        parts = (f"{name} {said(size)}" for name, size in dataclasses.asdict(self).items() if size)
        return f"{said(self.total)} ({', '.join(parts)})"


def said(size: int) -> str:
    """Return a size as text.

    Examples:
        >>> said(3 * 2**29), said(2**20)
        ('1.50 GiB', '1 MiB')
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def foreseen(
    shape: Shape, settings: TuneSettings, ranks: int = 1, chunk_bytes: int = CHUNK_BYTES, recompute: bool = True
) -> Memory:
    """Return what a training needs at its highest on one rank, weights included.

    Args:
        settings: with `dtype` bf16 or fp32.
        ranks: that hold the weights together; each has two layers and the embedding whole while it works on them.
        recompute: keep the input of every layer alone, and compute its activations again; see `recomputes`.
    """
    tokens = settings.length * settings.per_forward
    size = 2 if settings.dtype == "bf16" else 4
    trained = shape.adapters(settings.lora_rank) if settings.lora_rank else shape.weights
    frozen = shape.weight_bytes if settings.lora_rank else 0
    body = shape.weights - shape.vocabulary * shape.hidden
    casts = 0 if size == 4 else size * (trained if settings.lora_rank else body)
    wide = 4 * 7 * shape.hidden  # norms and residuals, and their gradients
    attention = size * (3 * shape.query + 4 * shape.key)
    feed_forward = size * 6 * shape.intermediate
    norms = (22 if size == 4 else 26) * shape.hidden  # with residuals; in bf16 what goes into products is kept besides
    kept = norms + size * (2 * shape.query + 2 * shape.key) + size * 7 * shape.intermediate // 2
    chunk = min(chunk_bytes, 4 * shape.vocabulary * tokens)
    head = 4 * shape.vocabulary * shape.hidden if not settings.lora_rank else 0
    whole = 0 if ranks == 1 else 2 * body // shape.layers + shape.vocabulary * shape.hidden
    at_work = whole * (shape.weight_bytes // shape.weights if settings.lora_rank else 4)
    return Memory(
        weights=(frozen + 4 * trained) // ranks + at_work,
        gradients=4 * trained // ranks + (0 if settings.lora_rank else at_work),
        optimizer=8 * trained // ranks,
        casts=casts,
        checkpoints=4 * tokens * shape.hidden * shape.layers if recompute else 0,
        kept=0 if recompute else tokens * kept * shape.layers,
        layer=tokens * (wide + attention + feed_forward),
        loss=3 * chunk + head,
    )


def recomputes(shape: Shape, settings: TuneSettings, available: int, ranks: int = 1) -> bool:
    """Return whether activations are computed again in the backward pass, as where they are many; losses are the same.

    They are kept where the whole training then takes at most half of the memory there is.
    """
    return foreseen(shape, settings, ranks, recompute=False).total > available // 2


def longest_that_fits(shape: Shape, settings: TuneSettings, available: int, ranks: int = 1) -> int | None:
    """Return the longest sequence whose training fits, in multiples of 1,024 tokens, or None."""
    least, most = 0, settings.length // 1024 + 1
    while most - least > 1:
        middle = (least + most) // 2
        fits = foreseen(shape, dataclasses.replace(settings, length=middle * 1024), ranks).total <= available
        least, most = (middle, most) if fits else (least, middle)
    return least * 1024 or None


def check(shape: Shape, settings: TuneSettings, available: int, ranks: int = 1) -> Memory:
    """Return what is foreseen.

    Raises:
        PipelineError: it is more than there is; the line says what would fit.
    """
    wanted = foreseen(shape, settings, ranks)
    if wanted.total <= available:
        return wanted
    fits = []
    if settings.per_forward > 1:
        smaller = dataclasses.replace(settings, per_forward=1)
        if foreseen(shape, smaller, ranks).total <= available:
            fits.append("--per-forward 1")
    if not settings.lora_rank:
        smaller = dataclasses.replace(settings, lora_rank=16)
        if foreseen(shape, smaller, ranks).total <= available:
            fits.append("--lora-rank 16")
    if (length := longest_that_fits(shape, settings, available, ranks)) is not None:
        fits.append(f"--length {length}")
    would = " or ".join(fits) or "nothing of this model"
    raise PipelineError(
        f"memory: got {said(available)} free, expected {wanted.describe()}; would fit: {would} "
        "(--overcommit tries it all the same)"
    )


def available_bytes(loaded_bytes: int) -> int:
    """Return the memory that training may take, the loaded weights' own included: of the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = _field("/proc/meminfo", "MemAvailable")
    own = _field("/proc/self/status", "VmRSS")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _number(file)
        if limit is not None:
            free = min(free, limit - own)
    return free + loaded_bytes


def share_of_memory(loaded_bytes: int, ranks: int) -> int:
    """Return the memory that one rank may take; ranks without GPUs are those of one machine."""
    available = available_bytes(loaded_bytes)
    return available if torch.cuda.is_available() else available // ranks


def _field(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return None
