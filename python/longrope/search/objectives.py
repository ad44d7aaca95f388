"""What a candidate is scored by: losses of some samples, each one forward, of which only some tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..data import Window
from ..evaluate.bootstrap import PairedDifference, paired_difference
from .screening import describe

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One forward: the first `length` tokens of a window, of which those from index `start` on count."""

    window: Window
    length: int
    start: int


class Objective(Protocol):
    """The mean, over samples, of the mean loss of the tokens that count, in nats per token; lower is better.

    Attributes:
        name: as `--objective` says it.
        length: tokens of the longest sample.
    """

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def samples(self) -> tuple[Sample, ...]: ...
    @property
    def unit(self) -> str:
        """What one sample is of, in words: `search document`."""
        ...

    @property
    def where(self) -> str:
        """What it reads, in words."""
        ...

    def shortened(self, length: int, documents: int) -> Objective:
        """Return the same on `length` tokens of the first documents, for a screen."""
        ...

    def difference(self, one: Sequence[Record], other: Sequence[Record]) -> PairedDifference:
        """Return the difference of two candidates by their records of all samples, with an interval."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what was minimised, JSON, for factor files."""
        ...


@dataclass(frozen=True)
class TextLoss:
    """Loss of documents over positions [start, length): LongRoPE's, where start is the length already known."""

    windows: tuple[Window, ...]
    length: int
    start: int
    name: str = "text"

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(Sample(window, self.length, self.start) for window in self.windows)

    @property
    def unit(self) -> str:
        return "search document"

    @property
    def where(self) -> str:
        return f"{describe(self.length, len(self.windows))}, scored from position {self.start:,}"

    def shortened(self, length: int, documents: int) -> TextLoss:
        return TextLoss(self.windows[:documents], length, self.start)

    def difference(self, one: Sequence[Record], other: Sequence[Record]) -> PairedDifference:
        return paired_difference(one, other, self.start, self.length)

    def describe(self) -> dict[str, Any]:
        return {
            "what": "mean negative log-likelihood in nats per token",
            "positions": [self.start, self.length],
            "documents": [window.describe() for window in self.windows],
        }
