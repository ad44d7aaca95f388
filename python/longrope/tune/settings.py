"""What decides the result of a fine-tuning, and the paper's recipes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import refuse

SCHEDULES = ("linear", "constant", "cosine")
DTYPES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TuneSettings:
    """Settings of one fine-tuning.

    Attributes:
        length: tokens of a training sequence.
        steps: of the optimizer.
        batch: sequences a step learns from, over all ranks.
        per_forward: sequences in one forward of one rank; their gradients are summed until a step has its batch.
        lr: AdamW's learning rate, at its highest.
        schedule: how it falls until the last step: linear or cosine to 0, or constant.
        warmup: steps in which it rises from 0.
        weight_decay: of matrices; norms and biases have none.
        betas: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0: not.
        dtype: of the computation, bf16 or fp32; auto: that of the loaded model where it is one of them, else bf16.
            Weights, gradients and the optimizer's state are float32.
        save_every: steps between checkpoints; the last step is always saved.
        stop_above: the loss, smoothed over some ten steps, may rise to this multiple of its least value before the run
            stops.
        seed: of the order of the documents.
        lora_rank: of low-rank adapters, trained in place of the weights and merged into them at the end; 0: none.
        short_share: of the sequences that are short windows (LongRoPE2's mixed training): as many tokens, but cut into
            windows of `short_length`, every text in them masked from the others and under the first regime.
        short_length: tokens of a short window; None: the length of the ladder's first regime.
    """

    length: int
    steps: int
    batch: int = 1
    per_forward: int = 1
    lr: float = 2e-5
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    save_every: int = 50
    stop_above: float = 1.5
    seed: int = 0
    lora_rank: int = 0
    short_share: float = 0.0
    short_length: int | None = None

    def __post_init__(self) -> None:
        whole = {"length": 64, "steps": 1, "batch": 1, "per_forward": 1, "warmup": 0, "save_every": 1, "lora_rank": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                self._refuse(name, f"an int >= {least}")
        for name in ("lr", "weight_decay", "max_grad_norm", "stop_above"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                self._refuse(name, "a finite number >= 0")
        if not self.lr:
            self._refuse("lr", "a number above 0")
        if not 0 <= self.short_share < 1:
            self._refuse("short_share", "a share from 0 to below 1")
        if self.short_share and self.per_forward > 1:
            self._refuse("per_forward", "1 beside --short-share")
        if self.stop_above <= 1:
            self._refuse("stop_above", "a multiple above 1")
        if self.batch % self.per_forward:
            self._refuse("per_forward", f"a divisor of the {self.batch} sequences of a step")
        if self.schedule not in SCHEDULES:
            self._refuse("schedule", f"one of {', '.join(SCHEDULES)}")
        if self.dtype not in DTYPES:
            self._refuse("dtype", f"one of {', '.join(DTYPES)}")
        if self.warmup > self.steps:
            self._refuse("warmup", f"at most the {self.steps} steps")

    def _refuse(self, name: str, expected: str) -> None:
        refuse(f"--{name.replace('_', '-')}", getattr(self, name), expected)

    @property
    def tokens(self) -> int:
        """Tokens the whole run reads."""
        return self.length * self.batch * self.steps


# arXiv 2402.13753, section 4.1 and appendix A.1; batches are of whole sequences.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-128k": {"length": 131072, "steps": 400, "batch": 32, "lr": 2e-5, "schedule": "linear"},
    "llama2-256k": {"length": 262144, "steps": 600, "batch": 32, "lr": 2e-5, "schedule": "linear"},
    "mistral": {"length": 16384, "steps": 400, "batch": 64, "lr": 1e-6, "schedule": "constant"},
    # For models of some million parameters, which take larger steps.
    "tiny": {"length": 4096, "steps": 60, "batch": 2, "lr": 1e-3, "schedule": "cosine", "warmup": 6, "save_every": 20},
}


def preset(name: str, **changes: Any) -> TuneSettings:
    """Return the settings of a recipe with some of them changed."""
    if name not in PRESETS:
        refuse("--preset", name, f"one of {', '.join(PRESETS)}")
    return dataclasses.replace(TuneSettings(**PRESETS[name]), **changes)
