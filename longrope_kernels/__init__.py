"""Non-uniform rotary position embedding, fused with blockwise attention."""

from importlib import import_module
from types import ModuleType

from . import reference
from .bundles import Pages
from .cache import KVCache
from .errors import BackendUnavailableError, UnsupportedRopeError
from .functional import apply_rope, apply_rope_in_place, attention, attention_paged, attention_varlen, cache_append
from .rope import LongRope, RopeScaling, check_monotone

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    # Loaded on use: testing needs hypothesis, integrations need what they integrate with, distributed is rarely needed.
    if name in ("distributed", "testing", "integrations"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackendUnavailableError",
    "KVCache",
    "LongRope",
    "Pages",
    "RopeScaling",
    "UnsupportedRopeError",
    "apply_rope",
    "apply_rope_in_place",
    "attention",
    "attention_paged",
    "attention_varlen",
    "cache_append",
    "check_monotone",
    "reference",
]
