"""What a model's rotary embedding saw in training: wavelengths, periods, the theoretical critical dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import longrope_kernels as lk


@dataclass(frozen=True)
class Pair:
    """One rotary pair.

    Attributes:
        wavelength_tokens: tokens in which the pair turns once.
        periods_in_training: turns over the original length; below 1 the model never saw all of its angles.
        periods_at_target: turns over the target length, unscaled.
    """

    pair: int
    wavelength_tokens: float
    periods_in_training: float
    periods_at_target: float | None


@dataclass(frozen=True)
class Inspection:
    """The rotary embedding of a model.

    Attributes:
        critical_pair: the first pair that turned less than once in training, of a model without factors of its own
            ceil((d/2) log_theta(L / 2 pi)); PI, NTK and YaRN all rest on it. LongRoPE2 found the one that matters in
            practice to lie lower.
        original_length: tokens it was trained on, where it was extended before, that length.
    """

    model: str
    model_type: str
    head_dim: int
    rotary_dim: int
    theta: float
    original_length: int
    target_length: int | None
    critical_pair: int
    pairs: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"format": "longrope-inspection/1", **asdict(self)}


def inspect_rope(
    rope: lk.LongRope, model: str = "", model_type: str = "", target_length: int | None = None
) -> Inspection:
    """Compute the table from a model's rotary embedding; no weights are needed."""
    scaling, original = rope.scalings[-1], rope.lengths[-1]
    assert scaling.theta is not None
    pairs = []
    for pair, frequency in enumerate(scaling.inv_freq.tolist()):
        wavelength = 2 * math.pi / frequency
        at_target = None if target_length is None else target_length / wavelength
        pairs.append(Pair(pair, wavelength, original / wavelength, at_target))
    return Inspection(
        model,
        model_type,
        scaling.head_dim,
        scaling.rotary_dim,
        scaling.theta,
        original,
        target_length,
        critical_pair(scaling.inv_freq.tolist(), original),
        tuple(pairs),
    )


def critical_pair(inv_freq: Sequence[float], length: int) -> int:
    """Return the index of the first pair that turns less than once in `length` tokens, or their number.

    Args:
        inv_freq: radians per token, as the pairs turn, factors included.

    Examples:
        >>> phi3, llama3 = lk.RopeScaling(head_dim=96, theta=1e4), lk.RopeScaling(head_dim=128, theta=5e5)
        >>> critical_pair(phi3.inv_freq.tolist(), 2048), critical_pair(llama3.inv_freq.tolist(), 8192)
        (31, 35)
    """
    return next((pair for pair, turn in enumerate(inv_freq) if length * turn < 2 * math.pi), len(inv_freq))
