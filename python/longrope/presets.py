"""Named settings of a run: what fits 20 minutes, what fits some hours, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import refuse
from .search.space import PAPER_START_TOKENS


@dataclass(frozen=True)
class Preset:
    """Fields of `context.Request` by name, a budget, and what else the evaluation does.

    Attributes:
        screen_shares: screening lengths as shares of the way from the original length to the target.
        last_budget: evaluations of the second search of a progressive extension; None: as many as of the others.
    """

    request: dict[str, Any]
    screen_shares: tuple[float, ...] = ()
    budget: int | None = None
    minutes: float | None = None
    passkey_depths: tuple[float, ...] = ()
    last_budget: int | None = None


PRESETS = {
    # SmolLM2-135M to 16,384 on 2 cores: about 25 minutes in all.
    "demo": Preset(
        {
            "search_documents": 2,
            "heldout_documents": 2,
            "population": 6,
            "iterations": 12,
            "mutations": 4,
            "crossovers": 2,
            "parents": 3,
            "screen_documents": 1,
            "screen_keep": 0.3,
            "start_tokens": (0,),
            "attention_factor": "search",
        },
        (0.75,),
        budget=60,
        minutes=12,
    ),
    # The same in some hours, n-hat included.
    "full": Preset(
        {
            "search_documents": 2,
            "heldout_documents": 4,
            "population": 12,
            "iterations": 100,
            "mutations": 4,
            "crossovers": 4,
            "parents": 6,
            "screen_documents": 1,
            "screen_keep": 0.3,
            "screen_controls": 1,
            "attention_factor": "search",
        },
        (0.75,),
        minutes=180,
        passkey_depths=(0.1, 0.5, 0.9),
    ),
    # Algorithm 1 as published: 1,344 candidates on 5 documents, each at the target length.
    "paper": Preset({"search_documents": 5, "heldout_documents": 5, "start_tokens": PAPER_START_TOKENS}),
    # The whole method as published for LLaMA2-7B: give it --to 2097152.
    "llama2": Preset(
        {
            "search_documents": 5,
            "heldout_documents": 5,
            "start_tokens": PAPER_START_TOKENS,
            "tune": ((131072, 400), (262144, 600)),
            "tune_batch": 32,
            "tune_lr": 2e-5,
            "readjust": (4096, 8192),
        },
    ),
    # The whole method on a model of some million parameters, 512 to 32,768 tokens, in minutes.
    "tiny": Preset(
        {
            "search_documents": 2,
            "heldout_documents": 2,
            "population": 8,
            "iterations": 20,
            "mutations": 4,
            "crossovers": 2,
            "parents": 4,
            "start_tokens": (0, 4, 16, 64),
            "attention_factor": "search",
            "tune": ((2048, 60), (4096, 60)),
            "tune_batch": 2,
            "tune_lr": 5e-4,
            "tune_schedule": "cosine",
            "tune_warmup": 10,
            "readjust": (512, 1024),
        },
        budget=180,
        last_budget=20,
    ),
}


# What `--method` sets, each also by its own option. LongRoPE2 has no n-hat.
METHODS: dict[str, dict[str, Any]] = {
    "longrope": {"objective": "text", "space": "all"},
    "longrope2": {"objective": "needle", "space": "critical", "start_tokens": (0,)},
}
OBJECTIVES, SPACES = ("text", "needle"), ("all", "critical")


def method(name: str) -> dict[str, Any]:
    """Return what a method sets, fields of `context.Request`."""
    if name not in METHODS:
        refuse("--method", name, f"one of {', '.join(METHODS)}")
    return {"method": name, **METHODS[name]}


def preset(name: str) -> Preset:
    """Return a preset by name."""
    if name not in PRESETS:
        refuse("--preset", name, f"one of {', '.join(PRESETS)}")
    return PRESETS[name]


def screen_lengths(shares: tuple[float, ...], original_length: int, target_length: int, block: int) -> tuple[int, ...]:
    """Return screening lengths, in whole blocks of the log.

    Examples:
        >>> screen_lengths((0.25, 0.5), 8192, 16384, 64)
        (10240, 12288)
    """
    lengths = (original_length + round(share * (target_length - original_length) / block) * block for share in shares)
    return tuple(sorted({length for length in lengths if original_length < length < target_length}))
