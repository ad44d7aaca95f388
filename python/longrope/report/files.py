"""The files of a run directory, as far as its stages have got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..search.screening import describe

OURS = "longrope"


@dataclass(frozen=True)
class Report:
    """The files of a run directory; None where a stage has not run.

    Attributes:
        measured: by method, what `longrope measure` has left.
    """

    run: dict[str, Any]
    inspection: dict[str, Any] | None
    documents: dict[str, Any] | None
    search: dict[str, Any] | None
    heldout: dict[str, Any] | None
    export: dict[str, Any] | None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.run["settings"])


def screen_text(screen: dict[str, Any]) -> str:
    """Say what a screen read; runs from before screens had documents of their own do not say how many."""
    if "documents" in screen:
        return describe(screen["length"], screen["documents"])
    return f"{screen['length']:,} tokens of every document"
