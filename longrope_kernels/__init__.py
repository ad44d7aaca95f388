"""Non-uniform rotary position embedding, fused with blockwise attention."""

from . import reference
from .errors import BackendUnavailableError, UnsupportedRopeError
from .functional import apply_rope, attention
from .rope import LongRope, RopeScaling, check_monotone

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "LongRope",
    "RopeScaling",
    "UnsupportedRopeError",
    "apply_rope",
    "attention",
    "check_monotone",
    "reference",
]
