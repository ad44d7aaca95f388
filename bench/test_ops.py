"""RoPE and attention, forward, backward and decode, ours beside torch: collected by `python -m bench`.

Also runs as `pytest bench`, without table and JSON of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from . import workloads
from .workloads import OURS, PACKED, TORCH, Shape, Work

TINY = "LONGROPE_BENCH_TINY"  # divides tokens, for tests of the machinery
BF16, FP32 = torch.bfloat16, torch.float32
SMALL, LARGE = (9, 3, 64), (16, 4, 128)


@dataclass(frozen=True)
class Case:
    """One comparison: `build` makes the work of `shape`."""

    section: str
    shape: Shape
    build: Callable[[Shape], Work]
    sides: tuple[str, ...] = (OURS, TORCH)
    rounds: int = 5
    wanted: float | None = None

    @property
    def name(self) -> str:
        return str(self.shape)

    @property
    def cost(self) -> float:
        """Seconds of one round of one side, roughly: what time left is estimated from."""
        shape = self.shape
        if self.section.startswith("rope"):
            return shape.heads * shape.head_dim * shape.tokens * 2e-9
        if self.section == "decode":
            return shape.heads * shape.head_dim * shape.tokens * 4e-10
        pairs = shape.heads * shape.head_dim * float(shape.tokens) ** 2
        return pairs * (1.5e-11 if self.section == "prefill" else 5e-11)


def _prefill(shape: Shape) -> Work:
    return workloads.prefill(shape, compile=False)


def _training(shape: Shape) -> Work:
    return workloads.training(shape, compile=False)


def _decode(shape: Shape) -> Work:
    return workloads.decode(shape, compile=False)


def _rope_backward(shape: Shape) -> Work:
    return workloads.rope(shape, backward=True)


def cases() -> list[Case]:
    """All comparisons, in the order of the table."""
    every = [
        *(Case("rope", Shape(*SMALL, 16384, dtype), workloads.rope, rounds=15) for dtype in (BF16, FP32)),
        Case("rope", Shape(*LARGE, 4096, BF16), workloads.rope, rounds=15),
        Case("rope backward", Shape(*SMALL, 16384, BF16), _rope_backward, rounds=10),
        *(Case("prefill", Shape(*SMALL, tokens, BF16), _prefill) for tokens in (1024, 4096)),
        Case("prefill", Shape(*SMALL, 16384, BF16), _prefill, wanted=1.5),
        Case("prefill", Shape(*LARGE, 4096, BF16), _prefill),
        Case("prefill", Shape(*SMALL, 4096, FP32), _prefill),
        Case("training", Shape(*SMALL, 4096, BF16), _training),
        Case("training", Shape(*LARGE, 4096, BF16), _training, rounds=3),
        Case("training", Shape(*SMALL, 4096, FP32), _training),
        Case("decode", Shape(*SMALL, 16384, BF16), _decode, (OURS, TORCH, PACKED), rounds=20),
        Case("decode", Shape(32, 8, 128, 32768, BF16), _decode, (OURS, TORCH, PACKED), rounds=10),
    ]
    divisor = int(os.environ.get(TINY, "1"))
    return [
        replace(case, shape=replace(case.shape, tokens=case.shape.tokens // divisor), rounds=min(case.rounds, 3))
        if divisor > 1
        else case
        for case in every
    ]


@functools.lru_cache(maxsize=1)
def work_of(case: Case) -> Work | workloads.Disagreement:
    """Build and check a case once for all its sides, which run one after the other."""
    try:
        return case.build(case.shape)
    except workloads.Disagreement as disagreement:
        return disagreement


@pytest.mark.parametrize(
    ("case", "side"),
    [(case, side) for case in cases() for side in case.sides],
    ids=lambda value: f"{value.section} {value.name}" if isinstance(value, Case) else value,
)
def test_operation(benchmark: Any, case: Case, side: str) -> None:
    """Time one side; no time is taken where the sides disagree."""
    work = work_of(case)
    if isinstance(work, workloads.Disagreement):
        raise work
    benchmark.group = f"{case.section}: {case.name}"
    benchmark.pedantic(work.sides[side], rounds=case.rounds, warmup_rounds=1)
