"""Fine-tuning under searched factors: packed segments, a loss in chunks, exact resume; see docs/tuning.md."""

from .settings import PRESETS, TuneSettings, preset

__all__ = ["PRESETS", "TuneSettings", "preset"]
