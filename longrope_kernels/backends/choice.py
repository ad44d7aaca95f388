"""Which of the two GPU backends comes first: a pure function of the problem, over a table of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Faster:
    """Where the CUDA kernels of an op beat Triton's on an architecture, as `bench/gpu.sh` measured it.

    Args:
        head_dims: of these, and of what lies between them.
        query_tokens: from so many a sequence on.
        key_tokens: from so many a sequence on.
    """

    head_dims: tuple[int, ...]
    query_tokens: int
    key_tokens: int = 0


# By op and compute capability. A line enters with the result in bench/results that it comes from; so far there is none.
MEASURED: Mapping[tuple[str, tuple[int, int]], Faster] = {}


def choose_backend(
    op: str,
    architecture: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    query_tokens: int,
    key_tokens: int,
    measured: Mapping[tuple[str, tuple[int, int]], Faster] = MEASURED,
) -> str:
    """Return "cuda" where its kernels were measured to be the faster ones, "triton" everywhere else.

    Args:
        op: the name of an op; in place it is the op that copies.
        architecture: compute capability, (9, 0) for Hopper.
        query_tokens, key_tokens: of a sequence's slots: those of all sequences where they are packed, the capacity of
            a cache. So a line that names lengths has a sequence's bits depend on what it is padded or packed with.
        measured: what to go by.
    """
    found = measured.get((op.removesuffix("_in_place"), architecture))
    if found is None or dtype not in (torch.float16, torch.bfloat16):
        return "triton"
    within = min(found.head_dims) <= head_dim <= max(found.head_dims)
    long = query_tokens >= found.query_tokens and key_tokens >= found.key_tokens
    return "cuda" if within and long else "triton"
