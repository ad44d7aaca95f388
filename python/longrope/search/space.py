"""What the search may choose: the factors of the rotary pairs, n-hat, and the attention factor.

`Space` is LongRoPE's. The spaces of LongRoPE2 and of the readjustment for short lengths are in `spaces.py`: each says
which pairs move, between which bounds, and what the others follow from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import longrope_kernels as lk

from ..errors import refuse
from ..run import digest

PAPER_START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Candidate:
    """One point of the space.

    Attributes:
        factors: lambda of each pair, relative to the model as it was trained.
        start_tokens: n-hat.
        attention_factor: multiplies cos and sin, relative to the model as it was trained.
        critical_pair: the pair from which on the factors are free, where the space searches it (LongRoPE2).
    """

    factors: tuple[float, ...]
    start_tokens: int = 0
    attention_factor: float = 1.0
    critical_pair: int | None = None

    @cached_property
    def id(self) -> str:
        """16 hex digits that name this point."""
        return digest(self.to_dict())

    @property
    def logs(self) -> np.ndarray:
        """Natural logarithms of the factors, float64[pairs]: where distances mean something."""
        return np.log(np.asarray(self.factors))

    def to_dict(self) -> dict[str, Any]:
        fields = {
            "factors": list(self.factors),
            "start_tokens": self.start_tokens,
            "attention_factor": self.attention_factor,
        }
        return fields if self.critical_pair is None else {**fields, "critical_pair": self.critical_pair}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Candidate:
        factors = tuple(fields["factors"])
        return cls(factors, fields["start_tokens"], fields["attention_factor"], fields.get("critical_pair"))

    def scaling(self, base: lk.RopeScaling) -> lk.RopeScaling:
        """Return the regime that this point makes of a model trained with `base`."""
        factors = [own * factor for own, factor in zip(base.rescale_factors, self.factors, strict=True)]
        return base.replace(
            rescale_factors=factors,
            start_tokens=self.start_tokens,
            attention_factor=base.attention_factor * self.attention_factor,
        )


@dataclass(frozen=True)
class Space:
    """The bounds of the search; defaults are the paper's.

    Attributes:
        pairs: rotary pairs, rotary_dim / 2.
        extension: s, target length over original length.
        start_tokens: choices of n-hat.
        attention_factors: choices, ascending; one alone fixes it.
        upper: largest factor; None: 1.25 s.
        monotone: lambda_i <= lambda_{i+1}.
    """

    pairs: int
    extension: float
    start_tokens: tuple[int, ...] = PAPER_START_TOKENS
    attention_factors: tuple[float, ...] = (1.0,)
    lower: float = 1.0
    upper: float | None = None
    step: float = 0.01
    monotone: bool = True

    def __post_init__(self) -> None:
        if self.pairs < 1:
            refuse("pairs", self.pairs, "an int >= 1")
        if not (math.isfinite(self.extension) and self.extension > 1):
            refuse("--to", f"{self.extension:g} times the original length", "a target above the original length")
        if not self.start_tokens or any(n < 0 for n in self.start_tokens):
            refuse("--start-tokens", self.start_tokens, "one or more ints >= 0")
        if not self.attention_factors or any(not 0 < m < math.inf for m in self.attention_factors):
            refuse("--attention-factor", self.attention_factors, "finite numbers > 0")
        if not 0 < self.step < 1:
            refuse("step", self.step, "a number between 0 and 1")
        if not 0 < self.lower < self.largest:
            refuse("lower", self.lower, f"a number above 0 and below the upper bound {self.largest:g}")

    @property
    def largest(self) -> float:
        return 1.25 * self.extension if self.upper is None else self.upper

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest factor of each pair, float64[pairs]."""
        return np.full(self.pairs, self.lower), np.full(self.pairs, self.largest)

    @property
    def span(self) -> float:
        """The distance, in logarithms of factors, that sizes of moves are relative to."""
        return math.log(self.extension)

    @property
    def words(self) -> str:
        """What factors there are, in words."""
        return f"factors in [{self.lower:g}, {self.largest:g}]"

    @property
    def critical_pairs(self) -> tuple[int, ...]:
        """Choices of `Candidate.critical_pair`; none where all pairs are free."""
        return ()

    def free_from(self, candidate: Candidate) -> int:
        """Return the first pair whose factor may move by itself."""
        return 0

    def legal(
        self,
        logs: Iterable[float],
        start_tokens: int = 0,
        attention_factor: float = 1.0,
        critical_pair: int | None = None,
    ) -> Candidate:
        """Return the nearest point of the space: monotone where that is asked, in bounds, on the grid.

        Args:
            logs: logarithms of the factors, float[pairs].
            critical_pair: for spaces that choose it.
        """
        values = np.asarray(list(logs), dtype=np.float64)
        factors = self._on_grid(values, *self.bounds)
        return Candidate(
            tuple(factors.tolist()),
            nearest(self.start_tokens, start_tokens),
            nearest(self.attention_factors, attention_factor),
        )

    def _on_grid(self, logs: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Return the nearest factors, by the monotone rule where it holds, in whole steps above the lower bounds."""
        values = nearest_monotone(logs) if self.monotone else logs
        steps = np.rint((np.clip(np.exp(values), lower, upper) - lower) / self.step)
        last = np.floor((upper - lower) / self.step + 1e-9)
        return np.round(lower + np.minimum(steps, last) * self.step, 10)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "all",
            "pairs": self.pairs,
            "extension": self.extension,
            "start_tokens": list(self.start_tokens),
            "attention_factors": list(self.attention_factors),
            "lower": self.lower,
            "upper": self.largest,
            "step": self.step,
            "monotone": self.monotone,
        }


def nearest_monotone(values: np.ndarray) -> np.ndarray:
    """Return the never-decreasing sequence nearest to `values` in the sum of squares (pool adjacent violators).

    Examples:
        >>> nearest_monotone(np.array([1.0, 3.0, 2.0, 4.0])).tolist()
        [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean = (mean * count + before * members) / (count + members)
            count += members
        pools.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in pools]) if pools else values


def nearest(choices: Sequence[Any], value: float) -> Any:
    """Return the choice closest to `value`."""
    return min(choices, key=lambda choice: abs(choice - value))
