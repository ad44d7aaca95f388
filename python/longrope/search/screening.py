"""Less text that ranks candidates before all of it decides, and the test whether that misleads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .space import Candidate


@dataclass
class Screen:
    """A cheaper score that may only rank.

    Attributes:
        score: lower is better.
        length: tokens it reads of each document.
        documents: how many it reads.
        keep: share of the candidates that go on to the next screen or the target.
        floor: once `least_pairs` candidates have both scores, the screen is dropped if Kendall's tau is below this.
    """

    score: Callable[[Candidate], float]
    length: int
    documents: int = 1
    keep: float = 0.34
    floor: float = 0.2
    least_pairs: int = 8
    scores: dict[str, float] = field(default_factory=dict)
    dropped_after: int | None = None

    @property
    def where(self) -> str:
        """What it reads, in words."""
        return describe(self.length, self.documents)

    def __call__(self, candidate: Candidate) -> float:
        value = self.score(candidate)
        self.scores[candidate.id] = value
        return value

    def judge(self, target: dict[str, float]) -> None:
        """Drop the screen where its ranks do not agree with those of the target length."""
        found = agreement(self.scores, target)
        if self.dropped_after is None and found.pairs >= self.least_pairs and found.tau < self.floor:
            self.dropped_after = found.pairs


def describe(length: int, documents: int) -> str:
    """Return what a screen reads, in words.

    Examples:
        >>> describe(14336, 1)
        '14,336 tokens of 1 document'
    """
    return f"{length:,} tokens of {documents} document{'s' * (documents != 1)}"


@dataclass(frozen=True)
class Agreement:
    """How a screen's ranks compare with the target's, over the candidates that have both scores.

    Attributes:
        tau: Kendall's rank correlation: 1 the same order, 0 none.
        rho: Spearman's.
        favourite_rank: rank at the target of the one the screen likes best; 1 is best.
    """

    pairs: int
    tau: float
    rho: float
    favourite_rank: int

    def to_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "tau": self.tau, "rho": self.rho, "favourite_rank": self.favourite_rank}


def agreement(screen: dict[str, float], target: dict[str, float]) -> Agreement:
    """Compare two scores by candidate id.

    Examples:
        >>> agreement({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.5, "b": 2.5, "c": 2.0})
        Agreement(pairs=3, tau=0.3333333333333333, rho=0.5, favourite_rank=1)
    """
    both = [key for key in screen if key in target]
    if len(both) < 2:
        return Agreement(len(both), 0.0, 0.0, 1 if both else 0)
    x, y = [screen[key] for key in both], [target[key] for key in both]
    favourite = y[x.index(min(x))]
    return Agreement(len(both), kendall_tau(x, y), spearman_rho(x, y), 1 + sum(value < favourite for value in y))


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Kendall's tau-b, which allows for ties; 0 where one side is all ties."""
    concordant = tied_x = tied_y = 0
    total = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        sign = _sign(a - c) * _sign(b - d)
        concordant += sign
        tied_x += a == c
        tied_y += b == d
        total += 1
    scale = ((total - tied_x) * (total - tied_y)) ** 0.5
    return concordant / scale if scale else 0.0


def spearman_rho(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the correlation of the ranks, ties sharing their mean rank; 0 where one side is all ties."""
    a, b = _ranks(x), _ranks(y)
    mean = (len(a) - 1) / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    scale = (sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)) ** 0.5
    return covariance / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
