"""Checks of the arguments of the ops: a failure is one line naming the argument, its value and what was expected.

Shapes, dtypes and devices are checked before anything is computed; values (positions, lengths) inside the op, where
they are at hand without a synchronisation, so that a compiled graph is checked too.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import overlap
from .bundles import KEY_GROUP, LARGEST, Geometry, Pages, Rotation
from .errors import brief, refuse

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256
MAX_POSITION = 2**31  # exclusive; the fixed-point angle is accurate to 2^-31 turn below it
_NORMAL = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def is_int(value: object) -> bool:
    """Tell whether a value is an integer of any library; a bool is none."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Tell whether a value is a finite real number of any library; a bool is none."""
    return (
        isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]
    )


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer in [least, most]."""
    if not is_int(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        refuse(name, brief(value), f"an int >= {least}" if most is None else f"an int in [{least}, {most}]")
    return int(value)  # type: ignore[call-overload]


def flag(name: str, value: object) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        refuse(name, brief(value), "True or False", TypeError)
    return value


def backend(name: str | None) -> str:
    """Return what the ops take for a backend: its name, or "" for None."""
    if name is not None and not isinstance(name, str):
        refuse("backend", brief(name), "a name or None", TypeError)
    return name or ""


def no_tangents(**operands: object) -> None:
    """Refuse tensors with a forward-mode tangent, which the ops would drop: reverse mode alone is implemented."""
    if forward_ad._current_level < 0:  # no level is open, and so there are none
        return
    for name, x in operands.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            refuse(name, "a tensor with a forward-mode tangent", "none: only reverse mode is implemented", TypeError)


def no_gradient(**operands: Tensor) -> None:
    """Refuse tensors through which autograd would have to follow an op that has no gradient."""
    if not torch.is_grad_enabled():
        return
    for name, x in operands.items():
        if x.requires_grad:
            refuse(name, "a tensor that requires a gradient", "none in place: apply_rope, or torch.no_grad()")


def written_over(query: Tensor, key: Tensor) -> None:
    """Refuse operands with elements that share memory, before an op writes over them."""
    for name, x in (("query", query), ("key", key)):
        if overlap.within(x):
            refuse(name, f"shape {tuple(x.shape)}, strides {x.stride()}", "elements of which no two share memory")
    if overlap.between(query, key):
        refuse("key", "memory that query has too", "memory of its own, as both are written over")


def operand(name: str, x: object, like: Tensor | None = None, layout: str = "[batch, heads, tokens, head_dim]") -> None:
    """Check one of query, key, value: a tensor of `layout`, matching `like` (the query) where that is given."""
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a tensor", TypeError)
    dense(name, x)
    if x.dim() != layout.count(",") + 1:
        refuse(name, f"shape {tuple(x.shape)}", layout)
    if x.dtype not in DTYPES:
        refuse(name, x.dtype, "float32, float16, bfloat16 (or float64, on the reference backend)", TypeError)
    if x.shape[-1] > MAX_HEAD_DIM or x.shape[-1] < 1:
        refuse(name, f"head_dim {x.shape[-1]}", f"a head_dim of 1 to {MAX_HEAD_DIM}")
    unit_last_stride(name, x)
    if like is None:
        return
    same_kind(name, x, like)
    if x.dim() == 4 and x.shape[0] != like.shape[0]:
        refuse(name, f"batch {x.shape[0]}", f"that of query, {like.shape[0]}")
    if x.shape[-1] != like.shape[-1]:
        refuse(name, f"head_dim {x.shape[-1]}", f"that of query, {like.shape[-1]}")


def dense(name: str, x: Tensor) -> None:
    """Check that a tensor is neither sparse nor nested."""
    if x.layout is not torch.strided or x.is_nested:
        refuse(name, "a nested tensor" if x.is_nested else x.layout, "a dense tensor", TypeError)


def unit_last_stride(name: str, x: Tensor) -> None:
    """Check that the last dimension is contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        refuse(name, f"stride {x.stride(-1)} in the last dimension", "a unit last stride (call .contiguous())")


def same_kind(name: str, x: Tensor, like: Tensor, what: str = "query") -> None:
    """Check dtype and device against those of another tensor."""
    if x.dtype != like.dtype:
        refuse(name, x.dtype, f"the dtype of {what}, {like.dtype}", TypeError)
    if x.device != like.device:
        refuse(name, f"device {x.device}", f"the device of {what}, {like.device}")


def heads(query: Tensor, key: Tensor) -> None:
    """Check that query heads, dimension 1, are a multiple of key heads."""
    if (key.shape[1] == 0) != (query.shape[1] == 0) or (key.shape[1] and query.shape[1] % key.shape[1]):
        refuse("key", f"{key.shape[1]} heads", f"a divisor of the {query.shape[1]} query heads")


def window(value: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return (left, right), -1 for unbounded, of a window argument."""
    if value is None:
        return -1, -1
    sides = (value - 1, 0) if is_int(value) and value >= 1 else value  # type: ignore[operator]
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(is_int(side) and side >= -1 for side in sides)
    ):
        refuse("window", brief(value), "a positive int, a pair (left, right) of ints >= -1, or None")
    # No two indices are further apart than MAX_POSITION, and kernels add a side to an index.
    left, right = (-1 if side >= MAX_POSITION else int(side) for side in sides)
    return left, right


def positive_or_none(name: str, value: float | None) -> None:
    """Check an optional scale or softcap, which kernels hold in float32."""
    if value is not None and not (is_real(value) and _NORMAL[0] <= value <= _NORMAL[1]):
        refuse(name, brief(value), f"a number in [{_NORMAL[0]:.3g}, {_NORMAL[1]:.3g}], float32's normal ones, or None")


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
    dense(name, value)
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
        _within("query_start", geometry.query_start, -MAX_POSITION, MAX_POSITION - query_tokens)


def bounds(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Return the bounds of a packed batch as int64[batch + 1]."""
    _integers(name, value, device)
    if value.dim() != 1 or value.shape[0] < 1:
        refuse(name, f"shape {tuple(value.shape)}", "[batch + 1], cumulative from 0")
    return value.to(torch.int64)


def bounds_values(name: str, value: Tensor, tokens: int, what: str) -> None:
    """Check that bounds ascend from 0 to the number of tokens, where they are on the host."""
    if value.device.type != "cpu":
        return
    ends = value.tolist()
    if ends[0] != 0 or ends[-1] != tokens:
        refuse(name, f"{ends[0]} ... {ends[-1]}", f"0 at its beginning and the {tokens} tokens of {what} at its end")
    for b in range(len(ends) - 1):
        if ends[b + 1] < ends[b]:
            refuse(name, f"{ends[b + 1]} after {ends[b]} at {b + 1}", "values that never fall")


def pages(pages: Pages) -> None:
    """Check shapes and dtypes of a cache."""
    key, value = pages.key, pages.value
    for name, x in (("key_pages", key), ("value_pages", value)):
        if x.dim() != 4:
            refuse(name, f"shape {tuple(x.shape)}", "[pages, key_heads, page_tokens, head_dim]")
        unit_last_stride(name, x)
        if x.device != key.device:
            refuse(name, f"device {x.device}", f"the device of key_pages, {key.device}")
    if value.shape != key.shape:
        refuse("value_pages", f"shape {tuple(value.shape)}", f"that of key_pages, {tuple(key.shape)}")
    count, heads_, page_tokens, head_dim = key.shape
    if page_tokens < 1:
        refuse("key_pages", f"{page_tokens} tokens a page", "at least 1")
    if pages.block_table.dim() != 2 or pages.block_table.dtype != torch.int32:
        refuse(
            "block_table", f"{pages.block_table.dtype} {tuple(pages.block_table.shape)}", "torch.int32 [batch, pages]"
        )
    if pages.length.shape != (pages.block_table.shape[0],) or pages.length.dtype != torch.int64:
        refuse("length", f"{pages.length.dtype} {tuple(pages.length.shape)}", "torch.int64 [batch], as block_table")
    scales = {"key_scale": pages.key_scale, "value_scale": pages.value_scale, "key_tail": pages.key_tail}
    if key.dtype != value.dtype:
        refuse("value_pages", value.dtype, f"{key.dtype}, as key_pages", TypeError)
    quantised = key.dtype in LARGEST
    missing = [name for name, x in scales.items() if (x is None) == quantised]
    if missing:
        kind = str(key.dtype).removeprefix("torch.") if quantised else key.dtype
        what = f"{'None' if quantised else 'a tensor'} beside {kind} pages"
        refuse(missing[0], what, "scales and tail with int8 or float8_e4m3fn pages, and only with them")
    if not quantised:
        return
    if page_tokens % KEY_GROUP:
        refuse("key_pages", f"{page_tokens} tokens a page", f"a multiple of {KEY_GROUP} in a quantised cache")
    shapes = {
        "key_scale": (count, heads_, page_tokens // KEY_GROUP, head_dim),
        "value_scale": (count, heads_, page_tokens),
        "key_tail": (pages.block_table.shape[0], heads_, KEY_GROUP, head_dim),
    }
    for name, scale in scales.items():
        assert scale is not None
        if tuple(scale.shape) != shapes[name] or not scale.is_contiguous():
            what = f"shape {tuple(scale.shape)}, strides {scale.stride()}"
            refuse(name, what, f"a contiguous {list(shapes[name])}")
        if name != "key_tail" and scale.dtype != torch.float32:
            refuse(name, scale.dtype, "float32", TypeError)


def page_values(pages: Pages, length: Tensor) -> None:
    """Check that sequences of `length` tokens lie inside their pages, and those inside the pool (on the host)."""
    if length.device.type != "cpu" or length.numel() == 0:
        return
    _within("length", length, 0, pages.capacity)
    used = (length + pages.page_tokens - 1) // pages.page_tokens
    table = pages.block_table.masked_fill(
        torch.arange(pages.block_table.shape[1], device="cpu") >= used.unsqueeze(1), 0
    )
    wrong = (table < 0) | (table >= pages.key.shape[0])
    if table.numel() and bool(wrong.any()):
        b, n = (int(i) for i in wrong.nonzero()[0])
        what = f"page {int(table[b, n])} for tokens {n * pages.page_tokens} and on of sequence {b}"
        refuse("block_table", what, f"one of the {pages.key.shape[0]} pages")


def append_values(pages: Pages, count: Tensor, tokens: int) -> None:
    """Check what is appended against the capacity of the cache and the tokens at hand (on the host)."""
    if count.device.type != "cpu" or count.numel() == 0:
        return
    _within("count", count, 0, tokens)
    _within("length", pages.length, 0, pages.capacity)
    full = pages.length + count
    if int(full.max()) > pages.capacity:
        b = int(full.argmax())
        what = f"{int(count[b])} tokens for sequence {b}, which has {int(pages.length[b])}"
        refuse("key", what, f"at most {pages.capacity} tokens in all, the capacity of its pages")
    page_values(pages, full)


def _within(name: str, value: Tensor, low: int, high: int) -> None:
    if value.device.type != "cpu" or value.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in value.aminmax())
    if smallest < low or largest > high:
        refuse(name, smallest if smallest < low else largest, f"values in [{low}, {high}]")
