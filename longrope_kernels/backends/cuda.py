"""The CUDA backend: hand-written kernels for Ampere and newer, float16 and bfloat16 (rotation: float32 too).

The native module takes addresses, strides and a stream, links no torch, and imports without a driver; it is built where
nvcc is found. `emulate` puts the same kernels, compiled for the host over csrc/emulator, in its place: they then take
CPU tensors where this backend is forced, and every access they make is checked.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..bundles import Geometry, Packing, Pages, Rotation
from . import native

NAME = "cuda"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
_Scratch = tuple[Tensor, tuple[int, int, int, int]]  # and how the native module addresses it
_native: ModuleType | None = None
_emulated_hopper = False
_ampere_alone = False
_import_error = ""
try:
    _native = importlib.import_module("longrope_kernels._cuda")
except ImportError as error:
    _import_error = str(error)


def emulate(module: ModuleType | None, hopper: bool = False) -> ModuleType | None:
    """Run kernels from `module` from now on, where there is a choice those of Hopper; return the module before."""
    global _native, _emulated_hopper
    before, _native, _emulated_hopper = _native, module, hopper
    return before


@contextlib.contextmanager
def ampere_kernels() -> Iterator[None]:
    """Leave Hopper's own kernels aside, to test and to time those of Ampere on a Hopper GPU."""
    global _ampere_alone
    before, _ampere_alone = _ampere_alone, True
    try:
        yield
    finally:
        _ampere_alone = before


def runs_hopper_kernels(device: torch.device) -> bool:
    """Return whether kernels of sm_90a run on a device: on capability 9.0, and nowhere else."""
    if _ampere_alone:
        return False
    return _emulated_hopper if _emulated() else torch.cuda.get_device_capability(device) == (9, 0)


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
    rotates = op in ("apply_rope", "apply_rope_in_place")
    if query.dtype not in [torch.float16, torch.bfloat16] + [torch.float32] * rotates:
        return f"no {query.dtype} kernels"
    if not rotates and (query.shape[-1] % 8 or query.shape[-1] > 256):
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
    # Contiguous whatever the operands' strides: what the op says beforehand, and torch.compile builds on.
    outputs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
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
    query, key, value = _aligned(query), _aligned(key), _bulk_readable(_aligned(value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    arguments, keep = native.batch_arguments(query, key, value, out, lse, rotation, geometry)
    call = _Attention(arguments, [query, key, value, *keep], [out, lse])
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    if rows <= _decode_rows():
        call.decode(rows, key.shape[2])
    else:
        scratch = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        call.prefill((scratch, native.operand(scratch)), None, key.shape[2], key.shape[2])
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
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients recomputed from lse; no atomics, the same bits in every run."""
    query, key, out = _aligned(query), _aligned(key), _aligned(out)
    value, grad_out = _bulk_readable(_aligned(value)), _bulk_readable(_aligned(grad_out))
    lse = lse.contiguous()
    arguments, keep = native.batch_arguments(query, key, value, out, lse, rotation, geometry)
    tokens = query.shape[2], key.shape[2]
    call = _Attention(arguments, [query, key, value, *keep], [out, lse])
    return call.backward(grad_out, grad_lse, native.operand, tokens, tokens, rotation, want_inv_freq)


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
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen`."""
    query, key, out = _aligned(query), _aligned(key), _aligned(out)
    value, grad_out = (_bulk_readable(_aligned(x), token_dim=0) for x in (value, grad_out))
    lse = lse.contiguous()
    packing = packing.inside(query.shape[0], key.shape[0])
    arguments, keep = native.packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    tokens = tuple(int(x.diff().max()) if packing.batch else 0 for x in (packing.query_bounds, packing.key_bounds))
    call = _Attention(arguments, [query, key, value, *keep], [out, lse])
    slots = query.shape[0], key.shape[0]
    return call.backward(grad_out, grad_lse, native.packed_operand, tokens, slots, rotation, want_inv_freq)


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Packed sequences: query [Tq, Hq, D], key and value [Tk, Hkv, D]; out like query, lse float32[Hq, Tq].

    Each sequence goes to the kernel that it would go to alone.
    """
    query, key, value = _aligned(query), _aligned(key), _bulk_readable(_aligned(value), token_dim=0)
    packing = packing.inside(query.shape[0], key.shape[0])
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    arguments, keep = native.packed_arguments(query, key, value, out, lse, rotation, geometry, packing)
    call = _Attention(arguments, [query, key, value, *keep], [out, lse])
    rows = packing.query_bounds.diff() * (query.shape[1] // key.shape[1])
    few = (rows > 0) & (rows <= _decode_rows())
    key_length = packing.key_bounds.diff()
    if bool(few.any()):
        call.decode(int(rows[few].max()), int(key_length[few].max()))
    if bool((rows > _decode_rows()).any()):
        scratch = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        call.prefill((scratch, native.packed_operand(scratch)), None, int(key_length.max()), key.shape[0])
    return out, lse


def attention_paged(query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over a cache, contiguous or paged, quantised or not; few queries read it once, where it lies."""
    _check_aligned(pages)
    query = _aligned(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    arguments, keep = native.cache_arguments(query, pages, out, lse, rotation, geometry)
    cache = [x for x in (pages.key, pages.value, pages.key_scale, pages.value_scale, pages.key_tail) if x is not None]
    call = _Attention(arguments, [query, *cache, *keep], [out, lse])
    rows = query.shape[1] // pages.key.shape[1] * query.shape[2]
    if rows <= _decode_rows():
        call.decode(rows, pages.capacity)  # bounds every length without asking the device
        return out, lse
    shape = (query.shape[0], pages.key.shape[1], int(pages.length.max()), query.shape[3])
    key, value = (torch.empty(shape, dtype=query.dtype, device=query.device) for _ in range(2))
    call.prefill((key, native.operand(key)), (value, native.operand(value)), shape[2], shape[2])
    return out, lse


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write the first `count[b]` of key and value [B, Hkv, T, D] behind the `length[b]` tokens of the cache."""
    _check_aligned(pages)
    key, value = _aligned(key), _aligned(value)
    arguments, keep = native.append_arguments(key, value, pages, count)
    cache = [x for x in (pages.key, pages.value, pages.key_scale, pages.value_scale, pages.key_tail) if x is not None]
    _call("cache_append", (arguments, key.shape[2]), [key, value, *keep], cache)


class _Attention:
    """One call: what the native module takes, the memory that kernels read, and the memory that they write."""

    def __init__(self, arguments: tuple[Any, ...], reads: list[Tensor], writes: list[Tensor]) -> None:
        self.arguments, self.reads, self.writes = arguments, reads, writes

    def prefill(self, key: _Scratch, value: _Scratch | None, key_tokens: int, key_slots: int) -> None:
        """Rotate the keys into scratch memory, gather the values of a cache there, and attend to them.

        Args:
            key_tokens: of the longest sequence.
            key_slots: tokens of the operands, which are those of all sequences where they are packed.
        """
        _, key_operand = key
        value_operand = (0, 0, 0, 0) if value is None else value[1]
        extra = (key_operand, value_operand, key_tokens, 0, 0, 0, 0)
        scratch = [x[0] for x in (key, value) if x is not None]
        _call("prepare_keys", (self.arguments, extra), self.reads, scratch)
        query, _, old_value, out, lse, tables, *rest = self.arguments
        rest[0] = ()  # no pages any more
        rotated = (query, key_operand, old_value if value is None else value_operand, out, lse, tables, *rest)
        reads = [*self.reads, *scratch]
        if runs_hopper_kernels(key[0].device) and key_slots > 0:
            _call("attention_forward_sm90", (rotated, key_slots), reads, self.writes)
        else:
            _call("attention_forward_sm80", (rotated,), reads, self.writes)

    def decode(self, rows: int, key_tokens: int) -> None:
        """Attend by runs of keys where they lie, and add the partial results."""
        assert _native is not None
        batch, _, key_heads, _, head_dim = self.arguments[14]
        splits = max(1, -(-key_tokens // _native.SPLIT_KEYS))
        device = self.writes[0].device
        partial = torch.empty(batch, key_heads, splits, rows, head_dim, dtype=torch.float32, device=device)
        lse = torch.empty(batch, key_heads, splits, rows, dtype=torch.float32, device=device)
        extra = ((0, 0, 0, 0), (0, 0, 0, 0), key_tokens, partial.data_ptr(), lse.data_ptr(), splits, rows)
        _call("attention_decode_sm80", (self.arguments, extra), self.reads, [partial, lse])
        _call("attention_combine", (self.arguments, extra), [*self.reads, partial, lse], self.writes)

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        operand: Callable[[Tensor], tuple[int, int, int, int]],
        tokens: tuple[int, ...],
        slots: tuple[int, int],
        rotation: Rotation,
        want_inv_freq: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotate queries and keys into scratch memory, run the kernels, add up the parts of the frequencies' gradient.

        Args:
            operand: how the native module addresses a tensor like the query.
            tokens: queries and keys of the longest sequence.
            slots: tokens of the operands, which are those of all sequences where they are packed.
        """
        assert _native is not None
        query, key, value, *keep = self.reads
        out, lse = self.writes
        # Tokens outside every sequence are not written: their gradient is 0.
        grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        d_inv_freq = torch.zeros_like(rotation.inv_freq)
        if query.numel() == 0 or key.numel() == 0:
            return grads[0], grads[1], grads[2], d_inv_freq
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.float().contiguous()
        rotated = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
        delta = torch.empty_like(lse)
        batch, query_heads, key_heads, _, _ = self.arguments[14]
        hopper = runs_hopper_kernels(query.device)
        group = query_heads // key_heads
        # Rows of a block are of one head in Hopper's kernels, of all that share a key head elsewhere.
        rows, of_heads = (tokens[0], group) if hopper else (tokens[0] * group, 1)
        row_blocks = -(-rows // _native.BACKWARD_ROWS) * of_heads
        key_blocks = -(-tokens[1] // _native.BACKWARD_KEYS)
        pairs = d_inv_freq.shape[1]
        parts = [
            torch.zeros(batch, key_heads, blocks, pairs, dtype=torch.float64, device=query.device)
            for blocks in ((row_blocks, key_blocks) if want_inv_freq else (0, 0))
        ]
        reads = [query, key, *keep]
        _call("prepare_queries", (self.arguments, operand(rotated[0])), reads, [rotated[0]])
        _call(
            "prepare_keys",
            (self.arguments, (operand(rotated[1]), (0, 0, 0, 0), tokens[1], 0, 0, 0, 0)),
            reads,
            [rotated[1]],
        )
        gradients = (operand(grad_out), grad_lse.data_ptr(), *map(operand, grads))
        at = [x.data_ptr() if want_inv_freq else 0 for x in parts]
        extra = (*map(operand, rotated), delta.data_ptr(), *at, row_blocks, key_blocks)
        _call(
            "attention_backward_sm90" if hopper else "attention_backward_sm80",
            (self.arguments, gradients, extra, *(slots if hopper else ())),
            [grad_out, grad_lse, value, out, lse, *rotated, *keep],
            [*grads, delta, *parts],
        )
        if want_inv_freq:
            # Not index_add_, whose order on a GPU is not fixed.
            by_sequence = torch.cat(parts, dim=2).sum((1, 2))
            regimes = torch.arange(d_inv_freq.shape[0], device=query.device)
            of_regime = (rotation.regime_index.unsqueeze(0) == regimes.unsqueeze(1)).unsqueeze(-1)
            d_inv_freq = torch.where(of_regime, by_sequence.unsqueeze(0), 0.0).sum(1)
        return grads[0], grads[1], grads[2], d_inv_freq


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


def _decode_rows() -> int:
    """Return how many rows, query heads of a key head times tokens, a sequence has at most whose keys are split."""
    assert _native is not None
    return int(_native.DECODE_ROWS)


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


def _check_aligned(pages: Pages) -> None:
    """Refuse a cache whose rows the kernels cannot access in pieces of 16 bytes, of 8 where they are quantised."""
    for name, x in (("key_pages", pages.key), ("value_pages", pages.value), ("key_tail", pages.key_tail)):
        if x is None:
            continue
        piece = 8 * x.element_size()
        steps = [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
        if x.data_ptr() % piece or any(step % 8 for step in steps[:-1]):
            past = f"address {x.data_ptr() % piece} past a multiple of {piece} bytes, strides {x.stride()}"
            checks.refuse(name, past, f"rows at multiples of {piece} bytes, as the cuda backend reads them")


def _bulk_readable(x: Tensor, token_dim: int = -2) -> Tensor:
    """Return x with strides that Hopper's bulk copies take, below 2^40 bytes and of tokens not 0: itself, or a copy."""
    if not runs_hopper_kernels(x.device):
        return x
    steps = [step for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
    expanded = x.shape[token_dim] > 1 and x.stride(token_dim) == 0
    if expanded or any(step * x.element_size() >= 1 << 40 for step in steps):
        return x.clone(memory_format=torch.contiguous_format)
    return x
