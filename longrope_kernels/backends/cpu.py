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
from . import reference

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
    batch, query_heads, query_tokens, head_dim = query.shape
    key_tokens = key.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32)
    starts = [x.contiguous() for x in geometry.resolved(batch, query_tokens, key_tokens, query.device)]
    positions = [None if x is None else x.contiguous() for x in (geometry.query_positions, geometry.key_positions)]
    window_right = geometry.window_right
    if geometry.is_causal:
        window_right = 0
    tables, keep_tables = _tables(rotation)
    _native.attention_forward(
        level(),
        _operand(query),
        _operand(key),
        _operand(value),
        _operand(out),
        lse.data_ptr(),
        tables,
        *[0 if x is None else x.data_ptr() for x in positions],
        *[x.data_ptr() for x in starts],
        (batch, query_heads, key.shape[1], query_tokens, key_tokens, head_dim),
        geometry.window_left,
        window_right,
        geometry.scale,
        geometry.softcap,
        _DTYPES[query.dtype],
        torch.get_num_threads(),
    )
    del keep_tables, positions, starts
    return out, lse


# Through the reference until there is a native backward kernel.
attention_backward = reference.attention_backward


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
