"""A quick look: our attention beside torch's with transformers' rotation, on this machine, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import longrope_kernels as lk

from .errors import refuse
from .models import DTYPES, check_dtype, default_dtype
from .progress import console, say, task

REPEATS = 3


def run_bench(
    lengths: tuple[int, ...] = (1024, 4096, 8192),
    heads: int = 9,
    key_heads: int = 3,
    head_dim: int = 64,
    dtype: str = "auto",
) -> list[dict[str, float]]:
    """Time causal attention over whole sequences; print a table and return its rows.

    Both sides include the rotation: ours is fused, torch's is what transformers' Llama does, on tables it has.
    """
    name = default_dtype() if dtype == "auto" else dtype
    check_dtype(name)
    if not lengths or min(lengths) < 1:
        refuse("--lengths", ",".join(map(str, lengths)) or "none", "one or more numbers of tokens above 0")
    scaling = lk.RopeScaling.yarn(head_dim, 1e5, 2.0, 8192)
    rows = []
    with task("bench", sum(2 * (REPEATS + 1) * length**2 for length in lengths)) as work:
        for length in lengths:
            generator = torch.Generator().manual_seed(0)
            query, key, value = (
                torch.randn(1, count, length, head_dim, generator=generator).to(DTYPES[name])
                for count in (heads, key_heads, key_heads)
            )
            angles = torch.arange(length).unsqueeze(1) * scaling.inv_freq.float()
            cos, sin = (table(torch.cat((angles, angles), -1)).to(query.dtype) for table in (torch.cos, torch.sin))

            def ours(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
                return lk.attention(q, k, v, scaling)

            def theirs(
                q: Tensor = query, k: Tensor = key, v: Tensor = value, cos: Tensor = cos, sin: Tensor = sin
            ) -> Tensor:
                half = head_dim // 2
                q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))
                return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            seconds = {}
            for label, run in (("ours", ours), ("torch", theirs)):
                seconds[label] = _median(run, lambda cost=length**2: work.advance(cost))  # type: ignore[misc]
            rows.append({"tokens": length, **seconds, "ratio": seconds["torch"] / seconds["ours"]})
    threads = torch.get_num_threads()
    say(f"Attention with rotation, {heads}/{key_heads} heads of {head_dim}, {name}, {threads} threads")
    table = Table()
    for heading in ("tokens", "longrope_kernels, ms", "torch SDPA + RoPE, ms", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tokens']:,.0f}", f"{1e3 * row['ours']:.1f}", f"{1e3 * row['torch']:.1f}", f"{row['ratio']:.2f}x"
        )
    console.print(table)
    return rows


@torch.inference_mode()
def _median(run: Callable[[], Tensor], done: Callable[[], None]) -> float:
    times = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        if repeat:
            times.append(time.perf_counter() - began)
        done()
    return statistics.median(times)
