"""The run directory: what was asked, every score ever computed, and the files of each stage.

A stage can be killed at any moment. JSON files appear whole or not at all; `evaluations.jsonl` is synced a line at a
time, and a torn last line is dropped when it is read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .errors import PipelineError, UsageError, disk_error, one_line, refuse

FORMAT = "longrope-run/1"
STAGES = "stages"  # a folder with a run directory for every stage of a progressive extension
BEGUN = {".lock", ".run.json.part"}  # and the log: what a run that was killed early may have left alone
ARGUMENTS = {
    "model": "MODEL",
    "model_fingerprint": "MODEL",
    "screens": "--screen",
    "ladder": "--factors",
    "searched": "--search",
}  # settings not named as their option


def digest(value: Any) -> str:
    """Return 16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunDirectory:
    """A directory that holds one run; only one process at a time may work in it.

    Args:
        path: made where it does not exist.
        settings: what was asked and decides results. A directory with evaluations of others is refused.
        extra: recorded beside the settings, and free to change from run to run (budgets, versions).
        defaults: what settings are in a directory that was made before there were such settings.
        log: name of the file of the run's evaluations, or of its steps.

    Raises:
        UsageError: another run's directory, one in use, or a folder of something else; the line names the difference.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        log: str = "evaluations.jsonl",
    ) -> None:
        self.path, self._log = Path(path), Path(path) / log
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = {file.name for file in self.path.iterdir()}
        except FileExistsError:
            refuse("--run-dir", path, "a directory, not a file")
        except OSError as error:
            raise disk_error(f"--run-dir {path}", error) from error
        if "run.json" not in names and (others := sorted(names - BEGUN - {log})):
            refuse("--run-dir", f"{path}, which has {others[0]} and no run.json", "a new or empty folder, or a run's")
        self._lock = self._take_lock()
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        try:
            self._check_settings(json.loads(json.dumps(defaults or {})))
        except PipelineError:
            self._lock.close()
            raise
        self.write_json("run.json", {"format": FORMAT, "settings": self.settings, **(extra or {})})
        self.evaluations = EvaluationLog(self._log)

    def _take_lock(self) -> IO[str]:
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            refuse("--run-dir", self.path, "a directory no other longrope process is working in")
        return lock

    def _check_settings(self, defaults: Mapping[str, Any]) -> None:
        file = self.path / "run.json"
        if not file.exists():
            return
        before = read_run(self.path)
        begun = self._log.is_file() and self._log.stat().st_size
        if not begun and not (self.path / STAGES).is_dir():
            # A run that came to nothing, for a wrong argument noticed late, claims no directory.
            (self.path / "documents.json").unlink(missing_ok=True)
            return
        known = {**defaults, **before["settings"]}
        names = {*known, *self.settings}
        if known.get("model_fingerprint") == self.settings.get("model_fingerprint") is not None:
            names.discard("model")  # the same files by another name, as where a run's folder was moved
        for name in sorted(names):
            if known.get(name) != self.settings.get(name):
                asked, made = _show(self.settings.get(name)), _show(known.get(name))
                if name == "model_fingerprint":
                    asked, made = f"files of fingerprint {asked}", f"those of {made}"
                refuse(
                    ARGUMENTS.get(name, f"--{name.replace('_', '-')}"),
                    f"{asked} in {self.path}",
                    f"{made}, with which that directory was made (or another --run-dir)",
                )

    def write_json(self, name: str, value: Any) -> Path:
        """Write a file that appears whole or not at all; floats keep every bit."""
        return self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file that appears whole or not at all."""
        file = self.path / name
        write_atomically(file, content)
        return file

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file, or None where there is none."""
        file = self.path / name
        return read_json(file) if file.exists() else None

    def close(self) -> None:
        """Let another process work here."""
        self.evaluations.close()
        self._lock.close()


class EvaluationLog:
    """Scores by key, in a file of one JSON object per line that is synced after every line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.torn = False
        self._writing = threading.Lock()
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held as long as the run
        except OSError as error:
            raise disk_error(str(path), error) from error
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise PipelineError(
                    f"{self.path}: got a broken line {number}, expected one JSON object a line"
                ) from None
        if whole < len(content):  # killed while it was written: that evaluation did not finish
            self.torn = True
            self._file.truncate(whole)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was recorded under `key`, or None."""
        return self.records.get(key)

    def append_once(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """`append`, unless there is a record under `key`, which then stays; return what is there. Any thread may."""
        with self._writing:
            known = self.get(key)
            return self.append(key, record) if known is None else known

    def append(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write and sync one evaluation, and return it as it will be read again.

        Raises:
            PipelineError: the disk is full; the file is as before.
        """
        line = (json.dumps({"key": key, **record}, separators=(",", ":")) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file.fileno(), line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise disk_error(str(self.path), error, f"all {len(self.records)} evaluations are kept") from error
        self.records[key] = json.loads(line)
        return self.records[key]

    def close(self) -> None:
        self._file.close()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: missing, half-written or not JSON; one line that names it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: got no such file, expected a JSON file") from None
    except (OSError, ValueError) as error:
        raise UsageError(one_line(f"{path}: got a broken file ({error}), expected whole JSON")) from None


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of a run directory's `run.json`, whose `settings` are those it was made with."""
    fields = read_json(folder / "run.json")
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or not isinstance(fields.get("settings"), dict):
        refuse("--run-dir", folder / "run.json", f"a run.json of format {FORMAT!r}")
    return fields


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, sync it and rename it: a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(str(path), error) from error


def now() -> str:
    """Return the time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
