"""The CPU backend: C++ kernels for x86-64 (and portable ones elsewhere), chosen by instruction set at run time.

`LONGROPE_KERNELS_CPU_LEVEL` caps the level: portable, avx2, avx512 or avx512_bf16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bundles import Geometry, Packing, Pages, Rotation
from . import native

NAME = "cpu"
QUANTISED = (torch.int8,)
_TO_BUILD = "install g++, then install this package again with LONGROPE_KERNELS_BUILD=1, which says what fails"
_CPU = torch.device("cpu")  # named, as the default device may be another
_native: ModuleType | None = None
_missing: str | None = None
try:
    _native = importlib.import_module("longrope_kernels._cpu")
except ModuleNotFoundError:
    _missing = f"the native module is not built: {_TO_BUILD}"
except ImportError as error:  # built elsewhere: its own message says what this machine lacks
    _missing = f"the native module does not load ({error}): {_TO_BUILD}"


def unavailable_reason() -> str | None:
    """Return why the native module is missing and what to do about it, or None."""
    return _missing


def supports(op: str, query: Tensor) -> str | None:
    """Return None for float32, float16 and bfloat16 tensors on the CPU."""
    if query.device.type != "cpu":
        return f"tensors are on {query.device}"
    if query.dtype not in native.DTYPES:
        return f"no {query.dtype} kernels"
    return None


def levels() -> list[str]:
    """Instruction sets that this build has and this processor can run, best first."""
    return [] if _native is None else list(_native.levels())


def calls() -> dict[str, int]:
    """How many calls the kernels of each of `levels` have served in this process."""
    return {} if _native is None else dict(_native.calls())


def level() -> str:
    """Return the instruction set in use: the best one, or what LONGROPE_KERNELS_CPU_LEVEL says.

    Raises:
        ValueError: the variable names a level that this build or processor does not have.
    """
    wanted = os.environ.get("LONGROPE_KERNELS_CPU_LEVEL", "")
    if wanted and wanted not in levels():
        raise ValueError(
            f"LONGROPE_KERNELS_CPU_LEVEL: got {wanted!r}, expected one that this processor and build have: "
            f"{', '.join(levels())}"
        )
    return wanted or levels()[0]


def advise_huge_pages(x: Tensor) -> bool:
    """Ask for huge pages under a large tensor, best before it is first written; whether the system has any to give.

    A decode reads gigabytes of a cache once: with 4 KiB pages it waits for their tables as well.
    """
    if _native is None or type(x) is not Tensor or x.device.type != "cpu" or not x.is_contiguous():
        return False
    return bool(_native.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size()))


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys; cos and sin are computed once per position for all heads."""
    outputs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=_CPU) for x in (query, key)]
    _rotate((query, key), outputs, rotation, (query_positions, key_positions), conjugate)
    assert outputs[0] is not None
    return outputs[0], outputs[1]


def apply_rope_in_place(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> None:
    """The same, written over the operands."""
    _rotate((query, key), (query, key), rotation, (query_positions, key_positions), conjugate)


def _rotate(
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    rotation: Rotation,
    positions: Sequence[Tensor | None],
    conjugate: bool,
) -> None:
    query = inputs[0]
    assert _native is not None
    assert query is not None
    operands: list[tuple[Any, ...]] = []
    keep: list[Tensor] = []
    for x, out, at in zip(inputs, outputs, positions, strict=True):
        if x is None or out is None or at is None:
            operands.append(((0, 0, 0, 0), (0, 0, 0, 0), 0, 0, 0, 0))
            continue
        at = at if at.stride(-1) == 1 else at.contiguous()
        keep.append(at)
        operands.append((native.operand(x), native.operand(out), at.data_ptr(), at.stride(0), *x.shape[1:3]))
    tables, keep_tables = native.table_arguments(rotation)
    _native.apply_rope(
        level(),
        *operands,
        tables,
        query.shape[0],
        query.shape[3],
        native.DTYPES[query.dtype],
        conjugate,
        torch.get_num_threads(),
    )
    del keep, keep_tables


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Fused rotation and attention: out like query, and lse float32[B, Hq, Tq]."""
    assert _native is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=_CPU)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=_CPU)
    arguments, keep = native.batch_arguments(query, key, value, out, lse, rotation, geometry)
    _native.attention_forward(level(), arguments)
    del keep
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    inv_freq_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients recomputed from lse; deterministic, nothing rotated is stored."""
    lse = lse.contiguous()
    arguments, keep = native.batch_arguments(query, key, value, out, lse, rotation, geometry)
    # Keys outside every sequence are not written: their gradient is 0.
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=_CPU) for x in (query, key, value)]
    d_inv_freq = _backward(
        arguments,
        grad_out,
        grad_lse,
        lse,
        [native.operand(x) for x in gradients],
        native.operand,
        rotation,
        inv_freq_gradient,
    )
    del keep
    return gradients[0], gradients[1], gradients[2], d_inv_freq


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Packed sequences: query [Tq, Hq, D], key and value [Tk, Hkv, D]; out like query, lse float32[Hq, Tq]."""
    assert _native is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=_CPU)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=_CPU)
    arguments, keep = native.packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    _native.attention_forward(level(), arguments)
    del keep
    return out, lse


def attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
    inv_freq_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen`."""
    lse = lse.contiguous()
    arguments, keep = native.packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=_CPU) for x in (query, key, value)]
    d_inv_freq = _backward(
        arguments,
        grad_out,
        grad_lse,
        lse,
        [native.packed_operand(x) for x in gradients],
        native.packed_operand,
        rotation,
        inv_freq_gradient,
    )
    del keep
    return gradients[0], gradients[1], gradients[2], d_inv_freq


def attention_paged(query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over a cache, contiguous or paged, quantised or not; one pass over it where queries are few."""
    assert _native is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=_CPU)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=_CPU)
    arguments, keep = native.cache_arguments(query, pages, out, lse, rotation, geometry)
    _native.attention_forward(level(), arguments)
    del keep
    return out, lse


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write the first `count[b]` of key and value [B, Hkv, T, D] behind the `length[b]` tokens of the cache."""
    assert _native is not None
    arguments, keep = native.append_arguments(key, value, pages, count)
    _native.cache_append(level(), arguments)
    del keep


def _backward(
    arguments: tuple[Any, ...],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    gradients: list[tuple[int, ...]],
    operand: Callable[[Tensor], tuple[int, ...]],
    rotation: Rotation,
    inv_freq_gradient: bool,
) -> Tensor:
    """Run the backward kernel into the `gradients` of query, key and value; return that of inv_freq."""
    assert _native is not None
    grad_out = grad_out if grad_out.stride(-1) == 1 or grad_out.shape[-1] == 1 else grad_out.contiguous()
    grad_lse = torch.zeros_like(lse, memory_format=torch.contiguous_format) if grad_lse is None else grad_lse
    grad_lse = grad_lse.float().contiguous()
    d_inv_freq = torch.zeros_like(rotation.inv_freq)
    by_sequence = torch.zeros(rotation.regime_index.shape[0], d_inv_freq.shape[1], dtype=torch.float64, device=_CPU)
    _native.attention_backward(
        level(),
        arguments,
        operand(grad_out),
        grad_lse.data_ptr(),
        *gradients,
        by_sequence.data_ptr() if inv_freq_gradient else 0,
    )
    # By numpy: torch's own starts threads, which a child of a fork does not have.
    np.add.at(d_inv_freq.numpy(), rotation.regime_index.numpy(), by_sequence.numpy())
    return d_inv_freq
