"""Checks of the arguments of the ops: a failure is one line naming the argument, its value and what was expected.

Shapes, dtypes and devices are checked before anything is computed; values (positions, lengths) inside the op, where
they are at hand without a synchronisation, so that a compiled graph is checked too.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from .bundles import Geometry, Rotation
from .errors import refuse

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256
MAX_POSITION = 2**31


def operand(name: str, x: object, like: Tensor | None = None) -> None:
    """Check one of query, key, value: a [batch, heads, tokens, head_dim] tensor, matching `like` (the query)."""
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    if x.dim() != 4:
        refuse(name, f"shape {tuple(x.shape)}", "[batch, heads, tokens, head_dim]")
    if x.dtype not in DTYPES:
        refuse(name, x.dtype, "float32, float16, bfloat16 (or float64, on the reference backend)", TypeError)
    if x.shape[-1] > MAX_HEAD_DIM or x.shape[-1] < 1:
        refuse(name, f"head_dim {x.shape[-1]}", f"a head_dim of 1 to {MAX_HEAD_DIM}")
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        refuse(name, f"stride {x.stride(-1)} in the last dimension", "a unit last stride (call .contiguous())")
    if like is None:
        return
    if x.dtype != like.dtype:
        refuse(name, x.dtype, f"the dtype of query, {like.dtype}", TypeError)
    if x.device != like.device:
        refuse(name, f"device {x.device}", f"the device of query, {like.device}")
    for dim, what in ((0, "batch"), (3, "head_dim")):
        if x.shape[dim] != like.shape[dim]:
            refuse(name, f"{what} {x.shape[dim]}", f"that of query, {like.shape[dim]}")


def heads(query: Tensor, key: Tensor) -> None:
    """Check that query heads are a multiple of key heads."""
    if (key.shape[1] == 0) != (query.shape[1] == 0) or (key.shape[1] and query.shape[1] % key.shape[1]):
        refuse("key", f"{key.shape[1]} heads", f"a divisor of the {query.shape[1]} query heads")


def window(value: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return (left, right), -1 for unbounded, of a window argument."""
    expected = "a positive int, a pair (left, right) of ints >= -1, or None"
    if value is None:
        return -1, -1
    if isinstance(value, int) and not isinstance(value, bool):
        return (value - 1, 0) if value >= 1 else _bad_window(value, expected)
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side >= -1 for side in value)
    ):
        _bad_window(value, expected)
    return value[0], value[1]


def _bad_window(value: object, expected: str) -> NoReturn:
    refuse("window", value, expected)


def positive_or_none(name: str, value: float | None) -> None:
    """Check an optional scale or softcap."""
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        refuse(name, value, "a finite number > 0 or None")


def positions(name: str, value: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
    """Return positions as int64[batch, tokens], from integers [tokens] or [batch, tokens]."""
    if value is None:
        return None
    _integers(name, value, device)
    if value.shape == (tokens,) or value.shape == (1, tokens):
        value = value.reshape(1, tokens).expand(batch, tokens)
    if value.shape != (batch, tokens):
        refuse(name, f"shape {tuple(value.shape)}", f"[{tokens}] or [{batch}, {tokens}]")
    return value.to(torch.int64)


def per_sequence(
    name: str, value: Tensor | None, batch: int, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor | None:
    """Return one integer per sequence as a tensor of `dtype`."""
    if value is None:
        return None
    _integers(name, value, device)
    if value.shape != (batch,):
        refuse(name, f"shape {tuple(value.shape)}", f"[{batch}], one per sequence")
    return value.to(dtype)


def _integers(name: str, value: object, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        refuse(name, type(value).__name__, "an integer tensor or None", TypeError)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        refuse(name, value.dtype, "an integer tensor", TypeError)
    if value.device != device:
        refuse(name, f"device {value.device}", f"the device of query, {device}")


def rotation_values(rotation: Rotation) -> None:
    """Check regime indices where they are on the host."""
    _within("regime_index", rotation.regime_index, 0, rotation.turns.shape[0] - 1)


def position_values(name: str, value: Tensor | None) -> None:
    """Check explicit positions where they are on the host."""
    if value is not None:
        _within(name, value, 0, MAX_POSITION - 1)


def geometry_values(geometry: Geometry, batch: int, query_tokens: int, key_tokens: int) -> None:
    """Check that every sequence lies inside its key slots, where the numbers are on the host."""
    position_values("query_positions", geometry.query_positions)
    position_values("key_positions", geometry.key_positions)
    if geometry.key_start is not None:
        _within("key_start", geometry.key_start, 0, key_tokens)
    if geometry.key_length is not None:
        _within("key_length", geometry.key_length, 0, key_tokens)
        if geometry.key_start is not None and geometry.key_length.device.type == "cpu":
            end = geometry.key_start + geometry.key_length
            if batch and int(end.max()) > key_tokens:
                refuse(
                    "key_length",
                    f"key_start + key_length = {int(end.max())} in sequence {int(end.argmax())}",
                    f"at most the {key_tokens} key slots",
                )
    if geometry.query_start is not None:
        _within("query_start", geometry.query_start, -MAX_POSITION, MAX_POSITION - 1)


def _within(name: str, value: Tensor, low: int, high: int) -> None:
    if value.device.type != "cpu" or value.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in value.aminmax())
    if smallest < low or largest > high:
        refuse(name, smallest if smallest < low else largest, f"values in [{low}, {high}]")
