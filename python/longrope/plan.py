"""What an extension will take, said before it starts: tokens, memory and time of every stage on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from longrope_kernels.integrations.transformers_layered import CHUNK_TOKENS

from .errors import refuse
from .loss import CHUNK_BYTES, token_nll
from .models import LoadedModel
from .progress import clock, console, say, waiting
from .tune.memory import GIB, Shape, available_bytes

TRAINING_FORWARDS = 4  # a step costs its forward, the forward again (checkpointing), and a backward of twice that
SHORTEST_TIMED, ENOUGH_SECONDS = 512, 2.0


@dataclass(frozen=True)
class Stage:
    """One step of the plan.

    Attributes:
        name: of its folder in the run directory.
        kind: search, tune, second search, readjust or evaluate.
        length: of its sequences, in tokens.
        sequences: forwards, or training sequences, of that length, at most; screens, which read less, are not counted.
        limit: seconds after which it stops, or None.
    """

    name: str
    kind: str
    length: int
    sequences: int
    limit: float | None = None

    @property
    def tokens(self) -> int:
        return self.length * self.sequences


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


def seconds_of(stage: Stage, pace: Pace) -> float:
    """Estimate a stage."""
    seconds = stage.sequences * pace.seconds(stage.length) * (TRAINING_FORWARDS if stage.kind == "tune" else 1)
    return seconds if stage.limit is None else min(seconds, stage.limit)


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
    room = available_bytes(Shape.of(loaded.model).weight_bytes)
    check_memory(original, loaded, [(stage, needs[stage.name]) for stage in stages], room)
    pace = measure_pace(loaded, target)
    rows = [
        {
            **stage.__dict__,
            "tokens": stage.tokens,
            "bytes": needs[stage.name],
            "seconds": round(seconds_of(stage, pace), 1),
        }
        for stage in stages
    ]
    return {
        "format": "longrope-plan/1",
        "original_length": original,
        "target_length": target,
        "stages": rows,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "notes": list(notes),
    }


def say_plan(plan: dict[str, Any]) -> None:
    """Print the plan as a table."""
    table = Table()
    for heading in ("stage", "sequences", "tokens each", "tokens", "memory", "time, about"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in plan["stages"]:
        counts = (f"{row[name]:,}" for name in ("sequences", "length", "tokens"))
        table.add_row(row["name"], *counts, f"{row['bytes'] / GIB:.2f} GiB", clock(row["seconds"]))
    say(
        f"Plan: {plan['original_length']:,} to {plan['target_length']:,} tokens, about {clock(plan['seconds'])} on "
        "this machine"
    )
    console.print(table)
    for note in plan["notes"]:
        say(f"  note: {note}")
