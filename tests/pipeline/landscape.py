"""A made-up objective whose best factors are known, with the shape of the real one: flat for pairs that turn often."""

from __future__ import annotations

import numpy as np

from longrope.search import Candidate, Space, seed_factors
from longrope.search.seeds import critical_seeds
from longrope.search.spaces import CriticalSpace, critical_choices
from longrope_kernels import RopeScaling

PAIRS, EXTENSION, ORIGINAL = 32, 4.0, 8192
BASE = RopeScaling(head_dim=2 * PAIRS, theta=1e5)
START_TOKENS = (0, 4, 16, 64, 256)
BEST_START_TOKENS = 16


def ramp(first: float, last: float, center: float, width: float) -> np.ndarray:
    """Return factors that go from one value to another along the pairs."""
    return first + (last - first) / (1.0 + np.exp(-(np.arange(PAIRS) - center) / width))


class Landscape:
    """A weighted distance of the logarithms from those of the best factors, and a penalty for another n-hat."""

    def __init__(self, best: np.ndarray, start_tokens: int = BEST_START_TOKENS) -> None:
        self.best, self.start_tokens = best, start_tokens
        self.weights = ramp(0.2, 1.0, PAIRS / 2, 4.0)
        self.calls: list[Candidate] = []

    def __call__(self, candidate: Candidate) -> float:
        self.calls.append(candidate)
        apart = self.weights * (candidate.logs - np.log(self.best)) ** 2
        far = abs(np.log2(1 + candidate.start_tokens) - np.log2(1 + self.start_tokens))
        return float(np.sqrt(apart.mean()) + 0.01 * far)


def space(monotone: bool = True, start_tokens: tuple[int, ...] = START_TOKENS) -> Space:
    return Space(PAIRS, EXTENSION, start_tokens, monotone=monotone)


def critical_space(monotone: bool = True) -> CriticalSpace:
    """LongRoPE2's space of the same model, whose theoretical critical pair is 20."""
    choices = critical_choices(20, PAIRS)
    return CriticalSpace(PAIRS, EXTENSION, (0,), monotone=monotone, critical=choices)


def critical_seeds_too() -> dict[str, Candidate]:
    return {**seeds(), **critical_seeds(critical_space())}


def seeds() -> dict[str, Candidate]:
    return seed_factors(BASE, ORIGINAL, EXTENSION)
