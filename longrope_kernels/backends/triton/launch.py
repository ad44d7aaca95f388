"""A launch as a value: the kernel, its grid, its arguments by name, its configuration.

The same value is run on a device or in the interpreter, and compiled ahead of time by tests and by the report: what is
checked without a GPU is what a call launches.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import triton

from .configs import Config


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as it is written."""
    return ".".join(map(str, version))


TRITON = _version(triton.__version__)
TELLS_PTXAS = (3, 4)  # the first Triton whose launches have options for the assembler
BLACKWELL = (3, 3)  # the first Triton whose assembler knows GPUs of compute capability 10 and up
# NumPy 2.4 no longer makes a number of an array of one element; this Triton's interpreter is the first not to ask.
NUMPY = (2, 4)
INTERPRETS_WITH_NUMPY = (3, 7)


@dataclass
class Launch:
    """One launch. `arguments` holds tensors, numbers and compile-time constants by parameter name.

    What the kernel has no parameter for is left out: Triton's launcher refuses it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    def __post_init__(self) -> None:
        self.arguments = {name: self.arguments[name] for name in _parameters(self.kernel)}

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return self.kernel.__name__

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's. Products fuse into sums whatever the environment or a later Triton (3.10) has as default."""
        told = {"ptx_options": self.config.ptxas} if self.config.ptxas and TRITON >= TELLS_PTXAS else {}
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True, **told}

    def run(self) -> None:
        """Launch on the current device."""
        if 0 in self.grid:
            return
        _debug(self.name, self.config)
        self.kernel[self.grid](**self.arguments, **self.options)


@functools.cache
def _parameters(kernel: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kernel.fn).parameters)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET was set when they were defined."""
    from .forward import forward_kernel

    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def interpreter_reason() -> str | None:
    """Return why Triton's interpreter cannot run the kernels here, or None."""
    numpy_has = _version(numpy.__version__)
    if TRITON >= INTERPRETS_WITH_NUMPY or numpy_has < NUMPY:
        return None
    had, wanted = dotted(numpy_has), dotted(NUMPY)
    return f"Triton {dotted(TRITON)} cannot interpret with NumPy {had}, expected NumPy before {wanted}"


def target_of(device: torch.device) -> str:
    """Return what a device is to the configurations: one of `configs.TARGETS` or `configs.TILES_OF`."""
    if device.type != "cuda":
        return "interpreter"
    return _target_of_index(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _target_of_index(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    # Consumer GPUs of generation 12 have the instructions of Ampere and the shared memory of sm_86, not sm_100's.
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_89" if capability >= (8, 9) else "sm_80")


@functools.cache
def _debug(name: str, config: Config) -> None:
    if os.environ.get("LONGROPE_KERNELS_DEBUG"):
        print(f"longrope_kernels: triton {name} {config}", file=sys.stderr)
