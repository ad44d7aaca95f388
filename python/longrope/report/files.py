"""The files of a run directory, as far as its stages have got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OURS = "longrope"


@dataclass(frozen=True)
class Report:
    """The files of a run directory; None where a stage has not run."""

    run: dict[str, Any]
    inspection: dict[str, Any] | None
    documents: dict[str, Any] | None
    search: dict[str, Any] | None
    heldout: dict[str, Any] | None
    export: dict[str, Any] | None

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.run["settings"])
