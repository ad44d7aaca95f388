"""The backends and the pure function that picks one.

A backend is a module with `NAME`, `QUANTISED` (the dtypes of quantised caches that it reads and writes),
`unavailable_reason`, `supports`, `apply_rope`, `apply_rope_in_place`, `attention` and `attention_backward`;
CONTRIBUTING tells how to add one. `LONGROPE_KERNELS_DEBUG=1` prints each choice, and what it was made from, once.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendUnavailableError, refuse
from .choice import choose_backend

# In the order in which they are tried for tensors of a device type; the reference runs everywhere.
# HIP devices are "cuda" to torch. Of Triton's kernels and the CUDA ones, `choice.choose_backend` says which come first.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
NAMES = ("reference", "cpu", "triton", "cuda")


@functools.cache
def load(name: str) -> ModuleType:
    """Import backend `name` (one of `NAMES`)."""
    if name not in NAMES:
        refuse("backend", repr(name), f"one of {', '.join(map(repr, NAMES))} or None")
    return importlib.import_module(f"{__name__}.{name}")


def unavailable_reason(name: str) -> str | None:
    """Return why backend `name` cannot run on this machine, or None where it can."""
    return load(name).unavailable_reason()


def pick(op: str, query: Tensor, key_tokens: int, backend: str | None, stored: torch.dtype | None = None) -> ModuleType:
    """Return the backend that runs `op` on `query`.

    Args:
        op: the name of an op, which is that of the backend's function.
        query: the tensor whose device, dtype, head_dim and tokens decide.
        key_tokens: of the keys beside it; the capacity of a cache, whose lengths the host does not know.
        backend: a name to force, or None (or "") for the first that can.
        stored: dtype of the pages, where the op is one of a cache.

    Raises:
        BackendUnavailableError: the forced backend cannot run here, or not this problem.
    """
    if backend:
        module = load(backend)
        reason = _refusal(module, op, query, stored)
        if reason:
            refuse("backend", repr(backend), f"one that can run {op} here: {reason}", BackendUnavailableError)
        _debug(op, query, key_tokens, f"{backend}, forced")
        return module
    reasons: list[str] = []
    for name in preference(op, query, key_tokens):
        module = load(name)
        reason = _refusal(module, op, query, stored)
        if reason is None:
            if name == "reference":
                _warn_slow("; ".join(reasons) or f"no kernels for {query.device.type} tensors")
            _debug(op, query, key_tokens, name)
            return module
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailableError("; ".join(reasons))


def preference(op: str, query: Tensor, key_tokens: int) -> tuple[str, ...]:
    """Return the backends for an op on `query`, in the order in which they are tried."""
    names = PREFERENCE.get(query.device.type, ("reference",))
    architecture = _architecture(query.device)
    if architecture is None:
        return names
    first = choose_backend(op, architecture, query.shape[-1], query.dtype, _query_tokens(op, query), key_tokens)
    return (first, *(name for name in names if name != first))


def _architecture(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU."""
    return None if device.type != "cuda" or torch.version.hip else torch.cuda.get_device_capability(device)


def _query_tokens(op: str, query: Tensor) -> int:
    return query.shape[0] if op.startswith("attention_varlen") else query.shape[-2]


def _refusal(module: ModuleType, op: str, query: Tensor, stored: torch.dtype | None) -> str | None:
    reason = module.unavailable_reason()
    if reason is None and not hasattr(module, op):
        reason = f"it has no {op}"
    reason = reason or module.supports(op, query)
    if reason is None and stored not in (None, query.dtype, *module.QUANTISED):
        reason = f"no kernels for caches of {stored}"
    return reason


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"longrope_kernels runs on the fp64 reference backend, up to 100 times slower than a kernel ({reason})",
        RuntimeWarning,
        stacklevel=2,
    )


def _debug(op: str, query: Tensor, key_tokens: int, chosen: str) -> None:
    if not os.environ.get("LONGROPE_KERNELS_DEBUG"):
        return
    architecture = _architecture(query.device)
    on = query.device.type if architecture is None else "sm_{}{}".format(*architecture)
    tokens = f"{_query_tokens(op, query)} query tokens, {key_tokens} key tokens"
    _print_once(f"{op} on {on}, {query.dtype}, head_dim {query.shape[-1]}, {tokens} -> {chosen}")


@functools.cache
def _print_once(line: str) -> None:
    print(f"longrope_kernels: {line}", file=sys.stderr)
