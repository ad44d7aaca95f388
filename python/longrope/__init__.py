"""Extend the context window of a pre-trained language model: search LongRoPE factors, evaluate, export, report.

The `longrope` command line (`longrope.cli`) is a thin layer over the functions of this package.
"""

from longrope_kernels import __version__

__all__ = ["__version__"]
