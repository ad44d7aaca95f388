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
    plan: dict[str, Any] | None = None
    lengths: dict[str, Any] | None = None
    ladder: dict[str, Any] | None = None
    tuning: tuple[dict[str, Any], ...] = ()
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    readjusted: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.run["settings"])


def screen_text(screen: dict[str, Any]) -> str:
    """Say what a screen read; older runs do not say it in words, the oldest not even of how many documents."""
    if "where" in screen:
        return str(screen["where"])
    if "documents" in screen:
        return describe(screen["length"], screen["documents"])
    return f"{screen['length']:,} tokens of every document"
