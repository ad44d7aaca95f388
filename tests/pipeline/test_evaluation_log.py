"""The log of evaluations: synced line by line, whole lines only, and nothing is lost to a full disk or a kill."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from longrope.errors import PipelineError
from longrope.run import EvaluationLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evaluations.jsonl"


def filled(path: Path, count: int = 3) -> EvaluationLog:
    log = EvaluationLog(path)
    for number in range(count):
        log.append(f"key{number}", {"score": number / 3})
    return log


def test_what_was_appended_is_read_again_bit_for_bit(path: Path) -> None:
    log = filled(path)
    log.close()
    again = EvaluationLog(path)
    assert again.records == log.records
    assert again.get("key1") == {"key": "key1", "score": 1 / 3}
    assert again.get("other") is None
    assert not again.torn


def test_every_line_is_synced_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EvaluationLog(path)
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(path.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    for number in range(3):
        log.append(str(number), {})
        assert len(synced) == number + 1
        assert synced[-1].splitlines()[-1] == f'{{"key":"{number}"}}'


def test_a_torn_last_line_is_dropped_and_the_next_one_starts_afresh(path: Path) -> None:
    filled(path).close()
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):  # wherever the kill fell; the last cut leaves nothing of the line
        path.write_bytes(whole[:-cut])
        log = EvaluationLog(path)
        assert sorted(log.records) == ["key0", "key1"]
        assert log.torn == (cut < last)
        log.append("key2", {"score": 2 / 3})
        log.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("broken", ["{", "[]", "7", '{"score": 1}', "\x00\x00\x00", "null"])
def test_a_broken_line_in_the_middle_is_refused_with_its_number(path: Path, broken: str) -> None:
    filled(path).close()
    lines = path.read_text().splitlines()
    lines[1] = broken
    before = "\n".join(lines) + "\n"
    path.write_text(before)
    with pytest.raises(PipelineError) as refused:
        EvaluationLog(path)
    assert str(refused.value) == f"{path}: got a broken line 2, expected one JSON object a line"
    assert path.read_text() == before, "a file that is not understood is not touched"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write half of what is asked, then have no space left, as a real disk does."""
    real, calls = os.write, []

    def write(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        yield


def test_a_full_disk_is_one_line_and_loses_nothing(path: Path, request: pytest.FixtureRequest) -> None:
    log = filled(path)
    before = path.read_bytes()
    request.getfixturevalue("full_disk")
    with pytest.raises(PipelineError) as failed:
        log.append("key3", {"score": 1.0})
    line = str(failed.value)
    assert line.startswith(f"{path}: got a full disk, expected free space; all 3 evaluations are kept")
    assert "\n" not in line
    assert path.read_bytes() == before
    assert "key3" not in log.records


def test_after_space_was_made_the_log_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(PipelineError, match="got a full disk"):
            log.append("key3", {"score": 1.0})
    log.append("key3", {"score": 1.0})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["key0", "key1", "key2", "key3"]


def test_a_file_the_kernel_lets_grow_no_further_keeps_its_whole_lines(path: Path) -> None:
    """A real short write and a real error: the limit on the size of files, in the middle of a line."""
    log = filled(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(PipelineError, match="got File too large, expected to write there; all 3 evaluations"):
            log.append("key3", {"score": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"evaluations\.jsonl: got .*, expected to write there"):
        EvaluationLog(tmp_path / "missing" / "evaluations.jsonl")
