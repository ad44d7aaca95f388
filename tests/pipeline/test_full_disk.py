"""A disk that fills up during the search: one line, nothing lost, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, Run
from test_killed_search import logged, searching


def test_a_full_disk_ends_the_search_with_one_line_and_it_goes_on_later(
    extended: Run, tmp_path: Path, command: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = searching(extended, tmp_path / "run")
    real, lines = os.write, 0

    def write(descriptor: int, content: bytes) -> int:
        nonlocal lines
        lines += 1
        if lines > 6:
            real(descriptor, content[:30])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        full = command(*arguments)
    log = tmp_path / "run" / "evaluations.jsonl"
    assert full.code == 1
    assert full.err == (
        f"longrope: {log}: got a full disk, expected free space; all 6 evaluations are kept, "
        "run the same command again\n"
    )
    kept = logged(tmp_path / "run")
    assert len(kept) == 6

    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    assert logged(tmp_path / "run")[:6] == kept
    winners = [
        json.loads((folder / "factors" / "winner.json").read_text())["rope"]
        for folder in (tmp_path / "run", extended.folder)
    ]
    assert winners[0] == winners[1]


def test_a_full_disk_while_a_result_is_written_is_one_line_too(
    extended: Run, tmp_path: Path, command: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        full = command(*searching(extended, tmp_path / "run"))
    assert full.code == 1
    assert full.err.startswith(f"longrope: {tmp_path / 'run' / 'run.json'}: got a full disk, expected free space;")
    assert full.err.count("\n") == 1
