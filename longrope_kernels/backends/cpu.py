"""The CPU backend: C++ kernels for x86-64 (and portable ones elsewhere), chosen by instruction set at run time.

`LONGROPE_KERNELS_CPU_LEVEL` caps the level: portable, avx2, avx512 or avx512_bf16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..bundles import Geometry, Packing, Pages, Rotation

NAME = "cpu"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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
    if query.dtype not in _DTYPES:
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
        out = torch.empty(x.shape, dtype=x.dtype, device=_CPU)
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
    out = torch.empty(query.shape, dtype=query.dtype, device=_CPU)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=_CPU)
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
    lse = lse.contiguous()
    arguments, keep = _attention_arguments(query, key, value, out, lse, rotation, geometry)
    # Keys outside every sequence are not written: their gradient is 0.
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=_CPU) for x in (query, key, value)]
    d_inv_freq = _backward(
        arguments, grad_out, grad_lse, lse, [_operand(x) for x in gradients], _operand, rotation, inv_freq_gradient
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
    arguments, keep = _packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
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
    arguments, keep = _packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=_CPU) for x in (query, key, value)]
    d_inv_freq = _backward(
        arguments, grad_out, grad_lse, lse, [_packed(x) for x in gradients], _packed, rotation, inv_freq_gradient
    )
    del keep
    return gradients[0], gradients[1], gradients[2], d_inv_freq


def attention_paged(query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over a cache, contiguous or paged, quantised or not; one pass over it where queries are few."""
    assert _native is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=_CPU)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=_CPU)
    length = pages.length.contiguous()
    start = (length - query.shape[2] if geometry.query_start is None else geometry.query_start).contiguous()
    zeros = torch.zeros_like(length)
    page_arguments, keep_pages = _pages(pages)
    arguments, keep = _arguments(
        [_operand(x) for x in (query, pages.key, pages.value, out)],
        (lse.data_ptr(), lse.stride(0), lse.stride(1)),
        page_arguments,
        (geometry.query_positions, None),
        (start, None, None, zeros, length),
        (query.shape[0], query.shape[1], pages.key.shape[1], query.shape[2], query.shape[3]),
        rotation,
        geometry,
        query.dtype,
    )
    _native.attention_forward(level(), arguments)
    del keep, keep_pages, zeros
    return out, lse


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write the first `count[b]` of key and value [B, Hkv, T, D] behind the `length[b]` tokens of the cache."""
    assert _native is not None
    page_arguments, keep = _pages(pages)
    length, count = pages.length.contiguous(), count.contiguous()
    _native.cache_append(
        level(),
        (
            *(_operand(x) for x in (key, value, pages.key, pages.value)),
            page_arguments,
            length.data_ptr(),
            count.data_ptr(),
            (key.shape[0], key.shape[1], key.shape[3]),
            _DTYPES[key.dtype],
            torch.get_num_threads(),
        ),
    )
    del keep


def _attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes for a batch, and the tensors that must outlive the call."""
    batch, query_heads, query_tokens, head_dim = query.shape
    starts = [x.contiguous() for x in geometry.resolved(batch, query_tokens, key.shape[2], query.device)]
    return _arguments(
        [_operand(x) for x in (query, key, value, out)],
        (lse.data_ptr(), lse.stride(0), lse.stride(1)),
        (),
        (geometry.query_positions, geometry.key_positions),
        (starts[0], None, None, starts[1], starts[2]),
        (batch, query_heads, key.shape[1], query_tokens, head_dim),
        rotation,
        geometry,
        query.dtype,
    )


def _packed_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rotation: Rotation,
    geometry: Geometry,
    packing: Packing,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The same for a packed batch: every sequence has batch stride 0 and begins at its own row."""
    query_count, key_length = packing.query_bounds.diff(), packing.key_bounds.diff()
    longest = int(query_count.max()) if query_count.numel() else 0
    return _arguments(
        [_packed(x) for x in (query, key, value, out)],
        (lse.data_ptr(), 0, lse.stride(0)),
        (),
        (geometry.query_positions, geometry.key_positions),
        (
            key_length - query_count,
            packing.query_bounds.contiguous(),
            query_count,
            packing.key_bounds.contiguous(),
            key_length,
        ),
        (packing.batch, query.shape[1], key.shape[1], longest, query.shape[2]),
        rotation,
        geometry,
        query.dtype,
    )


def _arguments(
    operands: list[tuple[int, ...]],
    lse: tuple[int, int, int],
    pages: tuple[Any, ...],
    positions: tuple[Tensor | None, Tensor | None],
    sequences: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    rotation: Rotation,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call.

    Args:
        positions: of queries and keys, int64[B or 1, T].
        sequences: query_start, query_slot, query_count, key_start, key_length: int64[B], contiguous.
    """
    tables, keep = _tables(rotation)
    rows = [None if x is None else x.contiguous() for x in positions]
    arguments = (
        *operands,
        lse,
        tables,
        pages,
        *((0, 0) if x is None else (x.data_ptr(), 0 if x.shape[0] == 1 else x.stride(0)) for x in rows),
        *(0 if x is None else x.data_ptr() for x in sequences),
        sizes,
        geometry.window_left,
        0 if geometry.is_causal else geometry.window_right,
        geometry.scale,
        geometry.softcap,
        _DTYPES[dtype],
        torch.get_num_threads(),
    )
    return arguments, [*keep, *(x for x in (*rows, *sequences) if x is not None)]


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
    return d_inv_freq.index_add_(0, rotation.regime_index.long(), by_sequence)


def _packed(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [tokens, heads, head_dim]."""
    return x.data_ptr(), 0, x.stride(1), x.stride(0)


def _pages(pages: Pages) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return what the native module takes, and the tensors that must outlive the call."""
    table = pages.block_table.contiguous()
    scales = [0 if x is None else x.data_ptr() for x in (pages.key_scale, pages.value_scale)]
    tail = (0, 0, 0, 0) if pages.key_tail is None else _operand(pages.key_tail)
    return (table.data_ptr(), table.shape[1], pages.page_tokens, *scales, tail), [table]


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
