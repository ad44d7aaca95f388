"""The CPU backend: C++ kernels for x86-64 (and portable ones elsewhere), chosen by instruction set at run time.

`LONGROPE_KERNELS_CPU_LEVEL` caps the level: portable, avx2, avx512 or avx512_bf16.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..bundles import Geometry, Rotation

NAME = "cpu"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_native: ModuleType | None = None
_import_error = ""
try:
    _native = importlib.import_module("longrope_kernels._cpu")
except ImportError as error:
    _import_error = str(error)


def unavailable_reason() -> str | None:
    """Return why the native module is missing, or None."""
    return None if _native is not None else f"the native module is not built ({_import_error})"


def supports(op: str, query: Tensor) -> str | None:
    """Return None for float32, float16 and bfloat16 tensors on the CPU."""
    if query.device.type != "cpu":
        return f"tensors are on {query.device}"
    if query.dtype not in _DTYPES:
        return f"no {query.dtype} kernels"
    return None


def levels() -> list[str]:
    """Instruction sets that this build has and this processor can run, best first."""
    return [] if _native is None else list(_native.levels())


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


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys; cos and sin are computed once per position for all heads."""
    assert _native is not None
    outputs: list[Tensor | None] = []
    operands: list[tuple[Any, ...]] = []
    keep: list[Tensor] = []
    for x, positions in ((query, query_positions), (key, key_positions)):
        if x is None or positions is None:
            outputs.append(None)
            operands.append(((0, 0, 0, 0), (0, 0, 0, 0), 0, 0, 0, 0))
            continue
        out = torch.empty(x.shape, dtype=x.dtype)
        if positions.stride(-1) != 1:
            positions = positions.contiguous()
        keep.append(positions)
        outputs.append(out)
        operands.append((_operand(x), _operand(out), positions.data_ptr(), positions.stride(0), *x.shape[1:3]))
    tables, keep_tables = _tables(rotation)
    _native.apply_rope(
        level(),
        *operands,
        tables,
        query.shape[0],
        query.shape[3],
        _DTYPES[query.dtype],
        conjugate,
        torch.get_num_threads(),
    )
    del keep, keep_tables
    assert outputs[0] is not None
    return outputs[0], outputs[1]


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Fused rotation and attention: out like query, and lse float32[B, Hq, Tq]."""
    assert _native is not None
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32)
    arguments, keep = _attention_arguments(query, key, value, out, lse, rotation, geometry)
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
    assert _native is not None
    # Keys outside every sequence are not written: their gradient is 0.
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value))
    grad_out = grad_out if grad_out.stride(-1) == 1 or grad_out.shape[-1] == 1 else grad_out.contiguous()
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.float().contiguous()
    d_inv_freq = torch.zeros_like(rotation.inv_freq)
    by_sequence = torch.zeros(query.shape[0], d_inv_freq.shape[1], dtype=torch.float64)
    arguments, keep = _attention_arguments(query, key, value, out, lse.contiguous(), rotation, geometry)
    _native.attention_backward(
        level(),
        arguments,
        _operand(grad_out),
        grad_lse.data_ptr(),
        _operand(d_query),
        _operand(d_key),
        _operand(d_value),
        by_sequence.data_ptr() if inv_freq_gradient else 0,
    )
    del keep
    d_inv_freq.index_add_(0, rotation.regime_index.long(), by_sequence)
    return d_query, d_key, d_value, d_inv_freq


def _attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call."""
    batch, query_heads, query_tokens, head_dim = query.shape
    starts = [x.contiguous() for x in geometry.resolved(batch, query_tokens, key.shape[2], query.device)]
    positions = [None if x is None else x.contiguous() for x in (geometry.query_positions, geometry.key_positions)]
    tables, keep = _tables(rotation)
    query_start, key_start, key_length = starts
    arguments = (
        *(_operand(x) for x in (query, key, value, out)),
        (lse.data_ptr(), *lse.stride()[:2]),
        tables,
        (),
        *((0, 0) if x is None else (x.data_ptr(), x.stride(0)) for x in positions),
        query_start.data_ptr(),
        0,
        0,
        key_start.data_ptr(),
        key_length.data_ptr(),
        (batch, query_heads, key.shape[1], query_tokens, head_dim),
        geometry.window_left,
        0 if geometry.is_causal else geometry.window_right,
        geometry.scale,
        geometry.softcap,
        _DTYPES[query.dtype],
        torch.get_num_threads(),
    )
    return arguments, [*keep, *starts, *(x for x in positions if x is not None)]


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _tables(rotation: Rotation) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call."""
    tensors = [
        x.contiguous()
        for x in (
            rotation.turns,
            rotation.base_turns,
            rotation.start_tokens,
            rotation.attention_factor,
            rotation.regime_index,
        )
    ]
    pairs = rotation.turns.shape[-1]
    return (*[x.data_ptr() for x in tensors], pairs, int(rotation.interleaved)), tensors
