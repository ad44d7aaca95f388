"""How much the search may spend, counted so that a resumed run spends the same.

Seconds are those recorded with each evaluation, not those of a wall clock: a run that was killed and started again
replays its evaluations from the log, arrives at the same sums, and so takes the same decisions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import BudgetExhausted


@dataclass
class Budget:
    """What may be spent and what was.

    Attributes:
        evaluations: forwards, of any length; None: any number.
        seconds: of evaluations; None: any time.
    """

    evaluations: int | None = None
    seconds: float | None = None
    spent_evaluations: int = 0
    spent_seconds: float = 0.0
    _by_length: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def bounds(self) -> dict[str, float | None]:
        """What may be spent; JSON."""
        return {"evaluations": self.evaluations, "seconds": self.seconds}

    def times(self, number: int) -> Budget:
        """Return `number` times this budget, nothing of it spent."""
        evaluations = None if self.evaluations is None else number * self.evaluations
        return Budget(evaluations, None if self.seconds is None else number * self.seconds)

    def spend(self, length: int, seconds: float) -> None:
        """Record one forward of `length` tokens."""
        self.spent_evaluations += 1
        self.spent_seconds += seconds
        self._by_length[length].append(seconds)

    def affords(self, forwards: Mapping[int, int]) -> bool:
        """Whether so many forwards of each length (tokens to count) fit into what is left."""
        if self.evaluations is not None and self.spent_evaluations + sum(forwards.values()) > self.evaluations:
            return False
        if self.seconds is None:
            return True
        cost = sum(count * self.seconds_of(length) for length, count in forwards.items())
        return self.spent_seconds + cost <= self.seconds

    def require(self, forwards: Mapping[int, int]) -> None:
        """Raise `BudgetExhausted` where they do not fit."""
        if not self.affords(forwards):
            raise BudgetExhausted

    def seconds_of(self, length: int) -> float:
        """Estimate a forward of `length` tokens from those seen: their mean, or scaled from the nearest length."""
        if not self._by_length:
            return 0.0
        known = min(self._by_length, key=lambda seen: abs(math.log(seen / length)))
        mean = sum(self._by_length[known]) / len(self._by_length[known])
        return mean * forward_cost(length) / forward_cost(known)

    @property
    def done(self) -> float:
        """Share of the budget that is spent, of whichever bound is nearer."""
        shares = [0.0]
        if self.evaluations:
            shares.append(self.spent_evaluations / self.evaluations)
        if self.seconds:
            shares.append(self.spent_seconds / self.seconds)
        return min(max(shares), 1.0)


def forward_cost(length: int) -> float:
    """Return what a forward of `length` tokens costs, in any unit: a linear part and attention's square.

    At 8,192 tokens SmolLM2-135M spends about as long in either (2 cores, AVX512-BF16).
    """
    return length * (1.0 + length / 8192)
