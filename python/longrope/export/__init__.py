"""A checkpoint that stock transformers loads, and the proof that it does; a GGUF file with the factors in it."""

from .checkpoint import export_checkpoint
from .gguf import export_gguf, read_gguf
from .reload import reload_check

__all__ = ["export_checkpoint", "export_gguf", "read_gguf", "reload_check"]
