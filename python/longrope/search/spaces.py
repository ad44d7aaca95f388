"""The spaces beside LongRoPE's: LongRoPE2's, free from the critical pair on, and the one between two embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import refuse
from .space import Candidate, Space, nearest


def ntk_below(extension: float, critical_pair: int, pairs: int) -> np.ndarray:
    """Return NTK factors whose base makes that of the critical pair s, float64[pairs].

    A base theta' rescales pair i by (theta' / theta)^(2i/d), so s at pair c needs theta' = theta s^(d/2c), and the
    factor of pair i is s^(i/c). LongRoPE2 keeps it below the critical pair (arXiv 2502.20082), where pairs
    turn often enough in training to be known all around.

    Examples:
        >>> ntk_below(4.0, 2, 4).tolist()
        [1.0, 2.0, 4.0, 8.0]
    """
    return extension ** (np.arange(pairs) / max(critical_pair, 1))


def critical_choices(theoretical: int, pairs: int) -> tuple[int, ...]:
    """Return where the real critical pair is looked for: from the theoretical one to a quarter of all pairs below.

    LongRoPE2 found it 6 of 48 pairs lower in Phi3-mini and 5 of 64 in LLaMA3-8B.

    Examples:
        >>> critical_choices(20, 32)
        (12, 13, 14, 15, 16, 17, 18, 19, 20)
    """
    last = min(theoretical, pairs - 1)
    return tuple(range(max(last - pairs // 4, min(last, 1)), last + 1))


@dataclass(frozen=True)
class CriticalSpace(Space):
    """LongRoPE2's space: factors in [s, 2s] from the critical pair on, NTK below, and the critical pair itself.

    Attributes:
        critical: choices of the critical pair, ascending; the last is the theoretical one.
    """

    critical: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.critical or not all(0 <= pair < self.pairs for pair in self.critical):
            refuse("critical pairs", self.critical, f"one or more pairs from 0 to {self.pairs - 1}")

    @property
    def largest(self) -> float:
        return 2.0 * self.extension if self.upper is None else self.upper

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.pairs, self.extension), np.full(self.pairs, self.largest)

    @property
    def span(self) -> float:
        return math.log(self.largest / self.extension)

    @property
    def words(self) -> str:
        return (
            f"factors in [{self.extension:g}, {self.largest:g}] from the critical pair on, which is one of "
            f"{self.critical[0]} to {self.critical[-1]}; NTK below"
        )

    @property
    def critical_pairs(self) -> tuple[int, ...]:
        return self.critical

    def free_from(self, candidate: Candidate) -> int:
        """Return a candidate's critical pair: the theoretical one of seeds that have none."""
        return self.critical[-1] if candidate.critical_pair is None else candidate.critical_pair

    def legal(
        self,
        logs: Iterable[float],
        start_tokens: int = 0,
        attention_factor: float = 1.0,
        critical_pair: int | None = None,
    ) -> Candidate:
        """Return the nearest point: NTK below the critical pair (None: the theoretical one), bounds and grid above."""
        chosen = nearest(self.critical, self.critical[-1] if critical_pair is None else critical_pair)
        values = np.asarray(list(logs), dtype=np.float64)[chosen:]
        lower, upper = (bound[chosen:] for bound in self.bounds)
        below = np.round(ntk_below(self.extension, chosen, self.pairs)[:chosen], 10)
        return Candidate(
            (*below.tolist(), *self._on_grid(values, lower, upper).tolist()),
            nearest(self.start_tokens, start_tokens),
            nearest(self.attention_factors, attention_factor),
            chosen,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "kind": "critical",
            "lower": self.extension,
            "critical_pairs": list(self.critical),
        }


@dataclass(frozen=True)
class Between(Space):
    """Every factor between that of one embedding, 1, and that of another: the space of a readjustment.

    Attributes:
        ends: factor of each pair in the other embedding, relative to the one; not all 1.
    """

    ends: tuple[float, ...] = ()

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        ends = np.minimum(np.asarray(self.ends), self.largest)
        return np.minimum(ends, 1.0), np.maximum(ends, 1.0)

    @property
    def words(self) -> str:
        return f"factors between the original's and the extended ones, up to {self.bounds[1].max():g}"

    def to_dict(self) -> dict[str, Any]:
        lower, upper = self.bounds
        ends = {"lower": float(lower.min()), "upper": float(upper.max()), "ends": list(self.ends)}
        return {**super().to_dict(), "kind": "between", **ends}
