"""A checkpoint that stock transformers loads, and the proof that it does."""

from .checkpoint import export_checkpoint
from .reload import reload_check

__all__ = ["export_checkpoint", "reload_check"]
