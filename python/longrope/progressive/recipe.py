"""What a progressive extension is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import UsageError, refuse
from ..search.readjust import LEAST_LENGTH

# What `longrope extend` calls the options of `longrope tune`.
OPTIONS = {
    **{f"--{name}": f"--tune-{name}" for name in ("batch", "lr", "schedule", "warmup", "short-share")},
    **{"--lora-rank": "--tune-lora", "--length": "--tune", "--steps": "--tune"},
}
MOST_WITHOUT_TRAINING = 8  # times the tuned length: how far the paper extends by a search alone


@dataclass(frozen=True)
class Recipe:
    """A progressive extension (arXiv 2402.13753, section 3.3).

    Factors are searched at each tuned length on the model as it came. It is then fine-tuned at the first under the
    first factors, and on from there at the next under the next. Where the target is longer, factors for it are searched
    on the tuned model, relative to those it was tuned under, and nothing more is trained. Last, factors for lengths
    below the tuned one are searched again: the tuned model reads short text better under less interpolation.

    Attributes:
        original: tokens the model was trained on.
        target: tokens of the result.
        tune: lengths to fine-tune at and optimizer steps at each, ascending.
        readjust: lengths whose factors are searched again on the tuned model, ascending.
        searched: False takes YaRN's factors for the tuned lengths and the target; readjustment searches all the same.
    """

    original: int
    target: int
    tune: tuple[tuple[int, int], ...]
    readjust: tuple[int, ...] = ()
    searched: bool = True

    def __post_init__(self) -> None:
        lengths = [length for length, _ in self.tune]
        if not lengths:
            refuse("--tune", "nothing", "at least one LENGTH:STEPS")
        if lengths != sorted(set(lengths)) or not self.original < lengths[0] or lengths[-1] > self.target:
            shown = ",".join(f"{length}:{steps}" for length, steps in self.tune)
            refuse("--tune", shown, f"ascending lengths above {self.original} and up to the target {self.target}")
        ascending = list(self.readjust) == sorted(set(self.readjust))
        if self.readjust and not (ascending and self.readjust[0] >= LEAST_LENGTH and self.readjust[-1] < self.tuned):
            expected = f"ascending lengths from {LEAST_LENGTH} to below the tuned length {self.tuned}"
            refuse("--readjust", ",".join(map(str, self.readjust)), expected)

    @property
    def tuned(self) -> int:
        """The longest length that is trained at."""
        return self.tune[-1][0]

    @property
    def notes(self) -> list[str]:
        """What the paper has no figures for, one line each."""
        times = self.target / self.tuned
        if times <= MOST_WITHOUT_TRAINING:
            return []
        return [f"the target is {times:g} times the tuned length; the paper goes up to {MOST_WITHOUT_TRAINING} times"]


@contextmanager
def named_as_typed() -> Iterator[None]:
    """Have a refusal of what is tuned with name the option that `longrope extend` has for it."""
    try:
        yield
    except UsageError as error:
        option, colon, rest = str(error).partition(":")
        raise UsageError(f"{OPTIONS.get(option, option)}{colon}{rest}") from error


def parse_tune(text: str) -> tuple[tuple[int, int], ...]:
    """Parse `2048:150,4096:100`; `none` is nothing."""
    if text == "none":
        return ()
    try:
        pairs = [tuple(int(part) for part in pair.split(":")) for pair in text.split(",")]
    except ValueError:
        pairs = [()]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        refuse("--tune", repr(text), "LENGTH:STEPS pairs separated by commas, or none")
    return tuple((pair[0], pair[1]) for pair in pairs)
