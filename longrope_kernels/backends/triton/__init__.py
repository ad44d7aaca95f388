"""The Triton backend: NVIDIA from Ampere on, AMD, and Triton's interpreter on CPU tensors.

Kernels: rope.py (rotation), forward.py, decode.py (few rows over many keys), backward.py, append.py (into a cache);
tiles.py and pages.py hold what they share; configs.py picks tile sizes; plans.py and plans_backward.py turn a call into
launches. `LONGROPE_KERNELS_DEBUG=1` prints each kernel's configuration once.

In the interpreter (TRITON_INTERPRET=1 before this is imported) the backend takes CPU tensors where it is forced, in
float32 and float16: the interpreter's bfloat16 is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib

import torch
from torch import Tensor

from ...bundles import Geometry, Packing, Pages, Rotation

NAME = "triton"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None


def unavailable_reason() -> str | None:
    """Return what is missing, triton or a GPU, or None."""
    if _missing():
        return _missing()
    from . import launch

    if launch.interpreting():
        return launch.interpreter_reason()
    if not torch.cuda.is_available():
        return "no GPU that torch can use, and TRITON_INTERPRET is not set"
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {launch.dotted(capability)}, expected 8.0 (Ampere) or newer"
    if capability >= (10, 0) and launch.TRITON < launch.BLACKWELL:
        had, needed = map(launch.dotted, (launch.TRITON, launch.BLACKWELL))
        return f"Triton {had} knows no GPU of compute capability {capability[0]}, expected {needed} or newer"
    return None


def supports(op: str, query: Tensor) -> str | None:
    """Return None for float32, float16 and bfloat16 tensors on a GPU; in the interpreter, on the CPU."""
    from .launch import interpreting

    wanted = "cpu" if interpreting() else "cuda"
    if query.device.type != wanted:
        return f"tensors are on {query.device}, not on {wanted}"
    if query.dtype not in _DTYPES:
        return f"no {query.dtype} kernels"
    if interpreting() and query.dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    return None


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys; cos and sin are computed once per position for all heads."""
    rotated = _rotate(query, rotation, query_positions, conjugate)
    return rotated, None if key is None else _rotate(key, rotation, key_positions, conjugate)


def apply_rope_in_place(
    query: Tensor,
    key: Tensor | None,
    rotation: Rotation,
    query_positions: Tensor,
    key_positions: Tensor | None,
    conjugate: bool,
) -> None:
    """The same, written over the operands."""
    _rotate(query, rotation, query_positions, conjugate, in_place=True)
    if key is not None:
        _rotate(key, rotation, key_positions, conjugate, in_place=True)


def _rotate(x: Tensor, rotation: Rotation, positions: Tensor | None, conjugate: bool, in_place: bool = False) -> Tensor:
    from . import plans
    from .launch import target_of

    with _on(x.device):
        out, launch = plans.rotate(x, rotation, positions, None, conjugate, target_of(x.device), in_place=in_place)
        launch.run()
    return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Fused rotation and attention: out like query, and lse float32[B, Hq, Tq]."""
    from . import plans
    from .launch import target_of

    with _on(query.device):
        out, lse, launches = plans.attention(query, key, value, rotation, geometry, target_of(query.device))
        for launch in launches:
            launch.run()
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
    """Gradients recomputed from lse; no atomics, the same bits in every run. Nothing rotated is kept."""
    from . import plans_backward
    from .launch import target_of

    with _on(query.device):
        gradients, partials, launches = plans_backward.attention_backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            out,
            lse,
            rotation,
            geometry,
            want_inv_freq,
            target_of(query.device),
        )
        for launch in launches:
            launch.run()
    return *gradients, plans_backward.frequency_gradient(partials, rotation.inv_freq)


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, geometry: Geometry, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Packed sequences: query [Tq, Hq, D], key and value [Tk, Hkv, D]; out like query, lse float32[Hq, Tq]."""
    from . import plans
    from .launch import target_of

    target = target_of(query.device)
    with _on(query.device):
        out, lse, launches = plans.attention_varlen(query, key, value, rotation, geometry, packing, target)
        for launch in launches:
            launch.run()
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
    want_inv_freq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_varlen`."""
    from . import plans_backward
    from .launch import target_of

    with _on(query.device):
        gradients, partials, launches = plans_backward.attention_varlen_backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            out,
            lse,
            rotation,
            geometry,
            packing,
            want_inv_freq,
            target_of(query.device),
        )
        for launch in launches:
            launch.run()
    return *gradients, plans_backward.frequency_gradient(partials, rotation.inv_freq)


def attention_paged(query: Tensor, pages: Pages, rotation: Rotation, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Attention over a cache of unrotated keys, contiguous or paged, quantised or not."""
    from . import plans
    from .launch import target_of

    with _on(query.device):
        out, lse, launches = plans.attention_paged(query, pages, rotation, geometry, target_of(query.device))
        for launch in launches:
            launch.run()
    return out, lse


def cache_append(key: Tensor, value: Tensor, pages: Pages, count: Tensor) -> None:
    """Write the first `count[b]` tokens of key and value [B, Hkv, T, D] behind the `length[b]` tokens of the cache."""
    from . import plans

    with _on(key.device):
        for launch in plans.cache_append(key, value, pages, count):
            launch.run()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
