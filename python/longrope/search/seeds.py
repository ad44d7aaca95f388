"""PI, NTK, YaRN and LongRoPE2's start: where the search begins, and what its result is measured against.

All rest on how fast the pairs turn, not on theta alone: a model that was tuned with factors of its own (LongRoPE's
second interpolation, Llama 3.1) is extended from the wavelengths it has.
"""

from __future__ import annotations

import math

import numpy as np

import longrope_kernels as lk

from .space import Candidate, nearest
from .spaces import Between, CriticalSpace

YARN_FAST, YARN_SLOW = 32.0, 1.0  # turns in the tuned length between which YaRN's ramp lies
BLENDS = (0.25, 0.5, 0.75)
SEEDS, CRITICAL_SEEDS = 3, 3  # how many `baselines` gives, and at most `critical_seeds`


def yarn_attention_factor(extension: float) -> float:
    """Return YaRN's 0.1 ln s + 1."""
    return 0.1 * math.log(extension) + 1.0


def su_attention_factor(extension: float, original_length: int) -> float:
    """Return LongRoPE's sqrt(1 + ln s / ln L), what transformers computes where a configuration gives none."""
    return math.sqrt(1.0 + math.log(extension) / math.log(original_length))


def effective_pairs(base: lk.RopeScaling) -> np.ndarray:
    """Return which pair of the embedding without factors turns as each of `base` does, float64[pairs].

    Pair i has the wavelength 2 pi theta^(i / pairs) lambda_i, that of pair i + pairs log_theta(lambda_i) unscaled.

    Examples:
        >>> effective_pairs(lk.RopeScaling(head_dim=8, theta=16.0, rescale_factors=[1.0, 1.0, 2.0, 4.0])).tolist()
        [0.0, 1.0, 3.0, 5.0]
    """
    assert base.theta is not None
    own = np.log(np.asarray(base.rescale_factors))
    return np.arange(base.pairs) + base.pairs * own / math.log(base.theta)


def seed_factors(base: lk.RopeScaling, original_length: int, extension: float) -> dict[str, Candidate]:
    """Return PI, NTK and YaRN with attention factor 1, relative to the model as it was trained.

    Of a model without factors of its own they are the constructors of `longrope_kernels.RopeScaling`, bit for bit.

    Args:
        base: the regime it was trained, or tuned, with.
        original_length: tokens it was trained, or tuned, on.
    """
    at = effective_pairs(base)
    share = np.clip((at - at[0]) / ((at[-1] - at[0]) or 1.0), 0.0, 1.0)
    factors = {
        "pi": [extension] * base.pairs,
        "ntk": [extension**one for one in share.tolist()],
        "yarn": _yarn(at, base, original_length, extension),
    }
    return {name: Candidate(tuple(map(float, values))) for name, values in factors.items()}


def _yarn(at: np.ndarray, base: lk.RopeScaling, original_length: int, extension: float) -> list[float]:
    """Return YaRN's factors of pairs that turn as pairs `at` of the embedding without factors (arXiv 2309.00071)."""
    assert base.theta is not None

    def pair_of(turns: float) -> float:
        return base.rotary_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base.theta or 0.0))

    low, high = max(math.floor(pair_of(YARN_FAST)), 0), min(math.ceil(pair_of(YARN_SLOW)), base.rotary_dim - 1)
    ramp = np.clip((at - low) / ((high - low) or 0.001), 0.0, 1.0).tolist()
    return [1.0 / (share / extension + (1.0 - share)) for share in ramp]


def baselines(base: lk.RopeScaling, original_length: int, extension: float) -> dict[str, Candidate]:
    """Return the methods as published, YaRN with its own attention factor: seeds, and what the result must beat."""
    methods = seed_factors(base, original_length, extension)
    yarn = methods["yarn"]
    methods["yarn"] = Candidate(yarn.factors, 0, yarn_attention_factor(extension))
    return methods


def critical_seeds(space: CriticalSpace) -> dict[str, Candidate]:
    """Return factors s from the critical pair on and NTK below, for the theoretical, the lowest and the middle one."""
    choices = space.critical
    tried = dict.fromkeys((choices[-1], choices[len(choices) // 2], choices[0]))
    return {f"critical pair {pair}": space.legal(np.zeros(space.pairs), critical_pair=pair) for pair in tried}


def blends(space: Between, start_tokens: int, attention_factor: float) -> dict[str, Candidate]:
    """Return both ends of a readjustment as they are, and geometric means between them, by the share of the far end.

    Args:
        start_tokens, attention_factor: of the far end, relative to the near one.
    """
    logs = np.log(np.asarray(space.ends))
    found = {"original": Candidate((1.0,) * space.pairs)}
    for share in BLENDS:
        factor = nearest(space.attention_factors, attention_factor**share)
        found[f"blend {share:g}"] = Candidate(tuple(np.exp(share * logs).tolist()), start_tokens, factor)
    found["extended"] = Candidate(space.ends, start_tokens, attention_factor)
    return found
