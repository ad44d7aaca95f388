"""Run a function on several ranks of a Gloo group, each a process of its own, and return what each returned."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Forked from a server that has imported what the first call of an op imports, and run nothing: a rank starts in 0.1 s.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch._dynamo", "longrope_kernels.distributed"])


def run(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a group of its own."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, context) as pool:
        place = f"file://{Path(folder) / 'meeting'}"
        return [
            future.result()
            for future in [pool.submit(_rank, place, rank, ranks, function, *arguments) for rank in range(ranks)]
        ]


def _rank(place: str, rank: int, ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    dist.barrier()  # a rank that is done early must not leave while others are still connecting
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
