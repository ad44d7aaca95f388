"""PI, NTK and YaRN: where the search starts, and what its result is measured against."""

from __future__ import annotations

import math
from typing import Any

import longrope_kernels as lk

from .space import Candidate

SEED_NAMES = ("pi", "ntk", "yarn")


def yarn_attention_factor(extension: float) -> float:
    """Return YaRN's 0.1 ln s + 1."""
    return 0.1 * math.log(extension) + 1.0


def su_attention_factor(extension: float, original_length: int) -> float:
    """Return LongRoPE's sqrt(1 + ln s / ln L), what transformers computes where a configuration gives none."""
    return math.sqrt(1.0 + math.log(extension) / math.log(original_length))


def seed_factors(base: lk.RopeScaling, original_length: int, extension: float) -> dict[str, Candidate]:
    """Return PI, NTK and YaRN with attention factor 1, relative to the model as it was trained."""
    assert base.theta is not None
    shape: dict[str, Any] = {"head_dim": base.head_dim, "theta": base.theta, "rotary_dim": base.rotary_dim}
    scalings = {
        "pi": lk.RopeScaling.pi(factor=extension, **shape),
        "ntk": lk.RopeScaling.ntk(factor=extension, **shape),
        "yarn": lk.RopeScaling.yarn(factor=extension, original_max_position_embeddings=original_length, **shape),
    }
    return {name: Candidate(scaling.rescale_factors) for name, scaling in scalings.items()}


def baselines(base: lk.RopeScaling, original_length: int, extension: float) -> dict[str, Candidate]:
    """Return the methods as published, YaRN with its own attention factor: seeds, and what the result must beat."""
    methods = seed_factors(base, original_length, extension)
    yarn = methods["yarn"]
    methods["yarn"] = Candidate(yarn.factors, 0, yarn_attention_factor(extension))
    return methods
