"""Timing in turns: every round runs each side once, beside the ceilings, so that all meet the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from longrope_kernels.backends import cpu

MATMUL = "torch matmul"
READ_AND_MULTIPLY = "read and multiply"
PROBE_SECONDS = 0.05
MATMUL_SIZE = 2048
MIN_ROUNDS, MAX_ROUNDS = 3, 15


@dataclass
class Samples:
    """Seconds of every side, and rates of every ceiling, one entry a round."""

    seconds: dict[str, list[float]]
    ceilings: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ceiling(self, name: str) -> float:
        return statistics.median(self.ceilings[name])

    def derive(self, name: str, calculate: Callable[[Mapping[str, float]], float]) -> None:
        """Add a side whose seconds are calculated from the medians of the others."""
        self.seconds[name] = [calculate({side: self.median(side) for side in self.seconds})]


Probe = Callable[[], float]


def probes(kind: str, dtype: torch.dtype, size: float = 1.0, operations: int = 0) -> dict[str, Probe]:
    """Return the ceilings that a work of this kind is measured against, the main one first.

    Args:
        kind: "compute" (GFLOP/s) or "memory" (GB/s).
        size: share of the full size of what is probed; below 1 in tests.
        operations: vector operations of the work for every 512 bytes of memory; with them a loop of as many
            multiply-adds beside the reads is measured too, where there is AVX-512.
    """
    native: ModuleType | None = cpu._native
    threads = torch.get_num_threads()
    found: dict[str, Probe] = {}
    if kind == "memory":
        count = max(int(size * 2**29), 2**16)
        memory = torch.ones(count // 4)

        def read() -> float:
            # A sum by torch read 75 GB/s where probe_read reached 58: the ceiling is the better one.
            began = time.perf_counter()
            memory.sum()
            by_torch = count / (time.perf_counter() - began) / 1e9
            return by_torch if native is None else max(by_torch, native.probe_read(threads, count))

        found["read"] = read
        if operations and native is not None and native.probe_read_multiply(threads, 2**16, operations) > 0:
            found[READ_AND_MULTIPLY] = lambda: native.probe_read_multiply(threads, count, operations)
        return found
    if native is not None:
        seconds = PROBE_SECONDS * max(size, 0.02)
        if dtype == torch.bfloat16 and native.probe_bf16(threads, 0.001) > 0:
            found["bf16 registers"] = lambda: native.probe_bf16(threads, seconds)
        else:
            found["FMA registers"] = lambda: native.probe_fma(threads, seconds)
    width = max(int(MATMUL_SIZE * size), 64)
    one = torch.ones(width, width, dtype=dtype)
    torch.mm(one, one)

    def matmul() -> float:
        began = time.perf_counter()
        torch.mm(one, one)
        return 2 * width**3 / (time.perf_counter() - began) / 1e9

    found[MATMUL] = matmul
    return found


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    ceilings: Mapping[str, Probe],
    budget_seconds: float,
    progress: Callable[[float], None] = lambda share: None,
    once: bool = False,
) -> Samples:
    """Time each side once a round, for as many rounds as the budget allows: at least 3, at most 15.

    One round before them warms up and is not counted. The side that begins changes from round to round.

    Args:
        once: one round and no warming up, for works of minutes.
        progress: called with the share of the rounds that are done.
    """
    samples = Samples({name: [] for name in sides}, {name: [] for name in ceilings})
    rounds = 1
    if not once:
        began = time.perf_counter()
        for call in sides.values():
            call()
        warm = time.perf_counter() - began
        rounds = min(max(round(budget_seconds / max(warm, 1e-6)), MIN_ROUNDS), MAX_ROUNDS)
    progress(1 / (rounds + 1))
    names = list(sides)
    for number in range(rounds):
        for name, probe in ceilings.items():
            samples.ceilings[name].append(probe())
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            sides[name]()
            samples.seconds[name].append(time.perf_counter() - began)
        progress((number + 2) / (rounds + 1))
    return samples
