"""What an extension will take, said before it starts: tokens, memory and time of every stage on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from longrope_kernels.integrations.transformers_layered import CHUNK_TOKENS

from .errors import refuse
from .loss import CHUNK_BYTES, token_nll
from .models import LoadedModel
from .progress import clock, console, say, waiting
from .team import rank
from .tune.memory import GIB, Shape, share_of_memory

TRAINING_FORWARDS = 3  # a step costs its forward and a backward of twice that
SHORTEST_TIMED, ENOUGH_SECONDS = 512, 2.0


@dataclass(frozen=True)
class Stage:
    """One step of the plan.

    Attributes:
        name: of its folder in the run directory.
        kind: search, tune, second search, readjust or evaluate.
        length: of its sequences, in tokens.
        sequences: forwards, or training sequences, of that length, at most.
        limit: seconds after which it stops, or None.
        screens: forwards of a search's screens, by their length.
        recompute: of a training, a second forward in the backward pass.
    """

    name: str
    kind: str
    length: int
    sequences: int
    limit: float | None = None
    screens: Mapping[int, int] = field(default_factory=dict)
    recompute: bool = False

    @classmethod
    def search(cls, name: str, kind: str, forwards: Mapping[int, int], limit: float | None) -> Stage:
        """Return a search's: the longest of its forwards, by length, are of the objective, the others of screens."""
        longest = max(forwards)
        screens = {length: count for length, count in forwards.items() if length != longest}
        return cls(name, kind, longest, forwards[longest], limit, screens)

    @property
    def forwards(self) -> dict[int, int]:
        """All sequences by their length, the stage's own last."""
        return {**self.screens, self.length: self.sequences}

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.forwards.items())


@dataclass(frozen=True)
class Pace:
    """Seconds of a forward as a function of its length: a linear part, and attention's square.

    Examples:
        >>> Pace.through((1000, 1.0), (2000, 3.0)).seconds(4000)
        10.0
    """

    linear: float
    square: float

    @classmethod
    def through(cls, one: tuple[int, float], other: tuple[int, float]) -> Pace:
        """Return the pace of two measured forwards, (tokens, seconds), the longer last; neither part is negative."""
        (a, x), (b, y) = one, other
        square = max((y / b - x / a) / (b - a), 0.0)
        return cls(max(x / a - square * a, 0.0), square)

    def seconds(self, length: int) -> float:
        return length * (self.linear + self.square * length)


def measure_pace(loaded: LoadedModel, longest: int) -> Pace:
    """Time forwards of random tokens, each four times as long as the last, until one takes two seconds or is `longest`.

    A pace taken far below the lengths it is asked for would miss attention's share, which shows at long ones alone.
    """
    vocabulary = loaded.model.config.get_text_config().vocab_size
    device = loaded.model.device

    def seconds(tokens: int) -> float:
        ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
        began = time.monotonic()
        token_nll(loaded.model, ids)
        return time.monotonic() - began

    with waiting("timing some forwards"):
        length = min(SHORTEST_TIMED, max(longest // 4, 2))
        seconds(length)  # the first forward of a process allocates, and compiles on a GPU
        found = [(length, seconds(length))]
        while len(found) < 2 or (found[-1][1] < ENOUGH_SECONDS and 4 * length <= longest):
            length *= 4
            found.append((length, seconds(length)))
    return Pace.through(*found[-2:])


def forward_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Return what one evaluation holds, weights included: `docs/long_inputs.md` has the formula and measurements."""
    config = loaded.model.config.get_text_config()
    item = next(loaded.model.parameters()).element_size()
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = config.hidden_size + 2 * key_heads * loaded.rope.head_dim
    chunk = min(tokens, CHUNK_TOKENS) * (3 * config.intermediate_size + 6 * config.hidden_size)
    return (
        Shape.of(loaded.model).weight_bytes
        + item * (tokens * row + chunk)
        + min(CHUNK_BYTES, 4 * tokens * config.vocab_size)
    )


def seconds_of(stage: Stage, pace: Pace, ranks: int = 1) -> float:
    """Estimate a stage whose sequences are shared out between ranks."""
    seconds = sum(math.ceil(count / ranks) * pace.seconds(length) for length, count in stage.forwards.items())
    seconds *= TRAINING_FORWARDS + stage.recompute if stage.kind == "tune" else 1
    return seconds if stage.limit is None else min(seconds, stage.limit / ranks)


def check_memory(original: int, loaded: LoadedModel, needs: Sequence[tuple[Stage, int]], room: int) -> None:
    """Refuse, before anything is done, what memory will not hold; the line says what would fit."""
    for stage, needed in needs:
        if needed <= room:
            continue
        have = f"{needed / GIB:.1f} GiB for {stage.length:,} tokens, with {room / GIB:.1f} GiB free"
        if stage.kind == "tune":
            refuse("--tune", have, "shorter sequences to train on, or --tune-lora")
        fits = original
        while forward_bytes(loaded, 2 * fits) <= room:
            fits *= 2
        refuse("--to", have, f"at most about {fits:,} tokens")


def check_room(loaded: LoadedModel, longest: int) -> None:
    """Refuse, before anything is done, forwards of so many tokens where memory will not hold one on every rank."""
    stage = Stage("forward", "forward", longest, 1)
    room = share_of_memory(Shape.of(loaded.model).weight_bytes, rank()[1])
    check_memory(loaded.original_length, loaded, [(stage, forward_bytes(loaded, longest))], room)


def make_plan(
    loaded: LoadedModel,
    original: int,
    target: int,
    stages: Sequence[Stage],
    training_bytes: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Time some forwards and return the plan; JSON.

    Args:
        training_bytes: what stages that train hold, by name.

    Raises:
        UsageError: more than there is; the line says what would fit.
    """
    needs = {stage.name: forward_bytes(loaded, stage.length) for stage in stages} | dict(training_bytes or {})
    _, ranks = rank()
    room = share_of_memory(Shape.of(loaded.model).weight_bytes, ranks)
    check_memory(original, loaded, [(stage, needs[stage.name]) for stage in stages], room)
    pace = measure_pace(loaded, target)
    rows = [
        {
            **stage.__dict__,
            "tokens": stage.tokens,
            "bytes": needs[stage.name],
            "seconds": round(seconds_of(stage, pace, ranks), 1),
        }
        for stage in stages
    ]
    return {
        "format": "longrope-plan/1",
        "original_length": original,
        "target_length": target,
        "stages": rows,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "notes": [*notes, *([f"spread over {ranks} ranks; memory is that of each"] if ranks > 1 else [])],
    }


def sequences_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return a stage's numbers of sequences and their lengths as text, those of screens first."""
    forwards = [*row.get("screens", {}).items(), (row["length"], row["sequences"])]
    return " + ".join(f"{count:,}" for _, count in forwards), " + ".join(f"{int(length):,}" for length, _ in forwards)


def say_plan(plan: dict[str, Any]) -> None:
    """Print the plan as a table."""
    table = Table()
    for heading in ("stage", "sequences", "tokens each", "tokens", "memory", "time, about"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in plan["stages"]:
        tokens, memory = f"{row['tokens']:,}", f"{row['bytes'] / GIB:.2f} GiB"
        table.add_row(row["name"], *sequences_of(row), tokens, memory, clock(row["seconds"]))
    say(
        f"Plan: {plan['original_length']:,} to {plan['target_length']:,} tokens, about {clock(plan['seconds'])} on "
        "this machine"
    )
    console.print(table)
    for note in plan["notes"]:
        say(f"  note: {note}")
