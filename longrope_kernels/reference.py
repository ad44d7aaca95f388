"""The fp64 definition of the ops, with the arguments of `attention` and `apply_rope`: what every kernel is held to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import functional


def apply_rope(query: Tensor, key: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`functional.apply_rope` in float64: operands widened first, results float64."""
    return functional.apply_rope(query.double(), None if key is None else key.double(), *args, **_forced(kwargs))


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`functional.attention` in float64: operands widened first, out and lse float64."""
    return functional.attention(query.double(), key.double(), value.double(), *args, **_forced(kwargs))


def _forced(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "backend": "reference"}
