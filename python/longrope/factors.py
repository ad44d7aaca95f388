"""Factor files: a searched rotary embedding with all that is needed to use it and to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import longrope_kernels as lk

from .errors import UsageError, one_line, refuse
from .run import now, read_json
from .search.space import Candidate

FORMAT = "longrope-factors/1"


def describe(
    rope: lk.LongRope,
    model: str,
    origin: str,
    candidate: Candidate | None = None,
    objective: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a factor file.

    Args:
        origin: `seed yarn`, `mutation of ...`, `crossover of ...`.
        candidate: relative to the model as it was trained, where it was trained with factors of its own.
        objective: what was minimised, on what, and the value reached.
        provenance: versions, seed, budget, documents.
    """
    long = rope.scalings[-1]
    return {
        "format": FORMAT,
        "model": model,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "max_position_embeddings": rope.max_position_embeddings,
        "rescale_factors": list(long.rescale_factors),
        "start_tokens": long.start_tokens,
        "attention_factor": long.attention_factor,
        "origin": origin,
        "candidate": None if candidate is None else candidate.to_dict(),
        "objective": dict(objective or {}),
        "provenance": {"created": now(), **(provenance or {})},
        "rope": rope.to_dict(),
    }


def read(path: str | Path, base: lk.RopeScaling | None = None) -> tuple[lk.LongRope, dict[str, Any]]:
    """Read a factor file.

    Args:
        base: the embedding of the model it is for; where given, the file must fit it.

    Raises:
        UsageError: missing, half-written, of another format or another model; one line.
    """
    try:
        fields = read_json(Path(path))
    except UsageError as error:
        raise UsageError(f"--factors: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or "rope" not in fields:
        refuse("--factors", path, f"a factor file of format {FORMAT!r}")
    try:
        rope = lk.LongRope.from_dict(fields["rope"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(one_line(f"--factors: {path}: {error}")) from None
    if base is not None:
        for name in ("head_dim", "rotary_dim", "theta", "interleaved"):
            found, wanted = getattr(rope.scalings[0], name), getattr(base, name)
            if found != wanted:
                refuse("--factors", f"{name} {found} in {path}", f"{wanted}, that of the model")
    return rope, fields
