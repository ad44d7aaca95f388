"""The CUDA backend: hand-written kernels for Ampere and newer, float16 and bfloat16 (rotation: float32 too).

The native module takes addresses, strides and a stream, links no torch, and imports without a driver; it is built where
nvcc is found. `emulate` puts the same kernels, compiled for the host over csrc/emulator, in its place: they then take
CPU tensors where this backend is forced, and every access they make is checked.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..bundles import Geometry, Packing, Rotation
from . import native

NAME = "cuda"
_native: ModuleType | None = None
_import_error = ""
try:
    _native = importlib.import_module("longrope_kernels._cuda")
except ImportError as error:
    _import_error = str(error)


def emulate(module: ModuleType | None) -> ModuleType | None:
    """Run kernels from `module` from now on; return the one before."""
    global _native
    before, _native = _native, module
    return before


def unavailable_reason() -> str | None:
    """Return what is missing, the module or a GPU that it has kernels for, or None."""
    if _native is None:
        return f"the native module is not built ({_import_error})"
    if _emulated():
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU that torch can use"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the GPU is older than Ampere"
    return None


def supports(op: str, query: Tensor) -> str | None:
    """Return None for what the kernels take: 16-bit types, and a head_dim that is a multiple of 8 up to 256."""
    wanted = "cpu" if _emulated() else "cuda"
    if query.device.type != wanted:
        return f"tensors are on {query.device}, not on {wanted}"
    dtypes = [torch.float16, torch.bfloat16] + [torch.float32] * (op == "apply_rope")
    if query.dtype not in dtypes:
        return f"no {query.dtype} kernels"
    if op != "apply_rope" and (query.shape[-1] % 8 or query.shape[-1] > 256):
        return f"head_dim {query.shape[-1]} is not a multiple of 8 up to 256"
    return None


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys in one launch; cos and sin are computed once per position for all heads."""
    outputs: list[Tensor | None] = [torch.empty_like(query), None if key is None else torch.empty_like(key)]
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


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Fused rotation and attention: out like query, and lse float32[B, Hq, Tq]."""
    query, key, value = (_aligned(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    scratch = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    arguments, keep = native.batch_arguments(query, key, value, out, lse, rotation, geometry)
    _attend(arguments, keep, (query, key, value, out, lse), scratch, native.operand, key.shape[2])
    return out, lse


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Packed sequences: query [Tq, Hq, D], key and value [Tk, Hkv, D]; out like query, lse float32[Hq, Tq]."""
    query, key, value = (_aligned(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    scratch = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    longest = int(packing.key_bounds.diff().max())
    arguments, keep = native.packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    _attend(arguments, keep, (query, key, value, out, lse), scratch, native.packed_operand, longest)
    return out, lse


def _rotate(
    inputs: tuple[Tensor | None, ...],
    outputs: list[Tensor | None] | tuple[Tensor | None, ...],
    rotation: Rotation,
    positions: tuple[Tensor | None, ...],
    conjugate: bool,
) -> None:
    query = inputs[0]
    assert query is not None
    operands: list[tuple[Any, ...]] = []
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for x, out, at in zip(inputs, outputs, positions, strict=True):
        if x is None or out is None or at is None:
            operands.append(((0, 0, 0, 0), (0, 0, 0, 0), 0, 0, 0, 0))
            continue
        at = at if at.stride(-1) == 1 else at.contiguous()
        reads += [x, at]
        writes.append(out)
        operands.append((native.operand(x), native.operand(out), at.data_ptr(), at.stride(0), *x.shape[1:3]))
    tables, keep = native.table_arguments(rotation)
    _call(
        "apply_rope",
        (*operands, tables, query.shape[0], query.shape[3], native.DTYPES[query.dtype], conjugate),
        [*reads, *keep],
        writes,
    )


def _attend(
    arguments: tuple[Any, ...],
    keep: list[Tensor],
    operands: tuple[Tensor, ...],
    scratch: Tensor,
    operand: Any,
    key_tokens: int,
) -> None:
    """Rotate the keys into `scratch`, then attend to them."""
    query, key, value, out, lse = operands
    extra = (operand(scratch), (0, 0, 0, 0), key_tokens, 0, 0, 0, 0)
    _call("prepare_keys", (arguments, extra), [key, *keep], [scratch])
    rotated = (*arguments[:1], operand(scratch), *arguments[2:])
    _call("attention_forward_sm80", (rotated,), [query, scratch, value, *keep], [out, lse])


def _emulated() -> bool:
    return hasattr(_native, "declare")


def _call(name: str, arguments: tuple[Any, ...], reads: list[Tensor], writes: list[Tensor]) -> None:
    """Enqueue kernel `name` on the current stream. The emulator holds it to what it says it reads and writes."""
    assert _native is not None
    device = writes[0].device
    if _emulated():
        ranges = [_range(x, False) for x in reads] + [_range(x, True) for x in writes]
        _native.declare([x for x in ranges if x[1] > 0])
        getattr(_native, name)(*arguments, 0)
        return
    with torch.cuda.device(device):
        getattr(_native, name)(*arguments, torch.cuda.current_stream(device).cuda_stream)


def _range(x: Tensor, writable: bool) -> tuple[int, int, bool, str]:
    """Return the address and bytes that a tensor's elements span."""
    elements = 0 if x.numel() == 0 else 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    shape = "x".join(map(str, x.shape))
    return x.data_ptr(), elements * x.element_size(), writable, f"{str(x.dtype).removeprefix('torch.')}[{shape}]"


def _aligned(x: Tensor) -> Tensor:
    """Return x with rows that 16-byte accesses can read: itself, or a copy."""
    steps = [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
    if x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps[:-1]) and x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)
