"""Triton's interpreter with its language patched once: to do so at each call takes half of all its time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def patch_once() -> None:
    """Have device functions called as they are.

    At each such call Triton looks through all its language for what is left to patch, half a millisecond on a core.
    There is nothing but the part that its own device functions use: the launch of a kernel has patched the part that
    kernels use.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        return function.rewrite()(*arguments, **options)

    interpreter._patch_lang(SimpleNamespace(__globals__={"core": tl.core}))
    interpreter.InterpretedFunction.__call__ = call
