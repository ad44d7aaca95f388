"""Extend the context window of a pre-trained language model: search LongRoPE factors, evaluate, export, report.

The `longrope` command line (`longrope.cli`) is a thin layer over the functions of this package.
"""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    # Not imported here: the command line silences other libraries' bars before torch and tqdm read the environment.
    if name == "__version__":
        from longrope_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
