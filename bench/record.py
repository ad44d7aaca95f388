"""JSON of one run: machine, versions, commit, and a row per work, written anew after every row."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import longrope_kernels as lk
from longrope_kernels.backends import cpu

from .timing import Samples
from .workloads import NAMES, OURS, Work

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
SCHEMA = 1
PACKAGES = ("torch", "transformers", "numpy", "pytest-benchmark", "llama-cpp-python")


def machine() -> dict[str, Any]:
    """Say what was measured on: processor, cores, memory, instruction set."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    known = {"processor": fields.get("model name", platform.processor() or platform.machine())}
    known |= {key: fields[name] for key, name in (("family", "cpu family"), ("model", "model")) if name in fields}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        **known,
        "architecture": platform.machine(),
        "cores": cores,
        "memory_gib": round(pages / 2**30, 1),
        "instruction_set": cpu.level() if cpu.unavailable_reason() is None else None,
    }


def commit() -> dict[str, Any]:
    """Name the commit, and whether tracked files other than results differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs", ":!*.md")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changed is None else bool(changed)}


def header(benchmark: str) -> dict[str, Any]:
    """Return all of a record but its rows."""
    versions = {"python": platform.python_version(), "longrope_kernels": lk.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "notes": {},
        "rows": [],
    }


def row(name: str, section: str, work: Work, samples: Samples, goals: dict[str, float] | None = None) -> dict[str, Any]:
    """Turn one measured work into a row: medians in seconds, ratios to ours, rate and share of each ceiling."""
    medians = {side: samples.median(side) for side in samples.seconds}
    seconds = medians[OURS]
    rate, unit = (work.flop, "GFLOP/s") if work.flop else (work.read_bytes, "GB/s")
    ceilings = {name: samples.ceiling(name) for name in samples.ceilings}
    return {
        "name": name,
        "section": section,
        "dtype": NAMES[work.shape.dtype],
        "shape": work.shape.to_dict(),
        "rounds": len(samples.seconds[OURS]),
        "seconds": medians,
        "ratios": {side: median / seconds for side, median in medians.items() if side != OURS},
        "rate": rate / seconds / 1e9,
        "unit": unit,
        "ceilings": ceilings,
        "shares": {name: rate / seconds / 1e9 / value for name, value in ceilings.items() if value > 0},
        "differences": work.differences,
        "goals": goals or {},
        "notes": work.notes,
        "samples": {"seconds": samples.seconds, "ceilings": samples.ceilings},
    }


def refused(name: str, section: str, reason: str) -> dict[str, Any]:
    """Return the row of a work without figures, and why."""
    return {"name": name, "section": section, "refused": reason}


class Record:
    """A record that is on the disk after every row, beside its final place until it is complete."""

    def __init__(self, benchmark: str, folder: Path = RESULTS) -> None:
        self.content = header(benchmark)
        self.path = folder / f"{benchmark}.json"
        self.partial = folder / f"{benchmark}.partial.json"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, found: dict[str, Any]) -> None:
        """Append a row and write."""
        self.rows.append(found)
        self._write(self.partial)

    def finish(self) -> Path:
        """Mark the record as complete and put it in its place."""
        self.content["complete"] = True
        self._write(self.partial)
        self.partial.replace(self.path)
        return self.path

    def _write(self, path: Path) -> None:
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(_rounded(self.content), indent=1) + "\n")
        fresh.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read a complete record.

    Raises:
        ValueError: one line, where it is not one.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: got {error}, expected a record of a benchmark") from None
    if content.get("schema") != SCHEMA or not content.get("complete"):
        raise ValueError(
            f"{path.name}: got schema {content.get('schema')}, complete {content.get('complete')}, "
            f"expected schema {SCHEMA} of a run that ended"
        )
    return content


def _rounded(value: Any) -> Any:
    """Round floats to 5 digits: no timing has more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, list) else value
