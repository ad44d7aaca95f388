"""A search that is killed with SIGKILL, twice and at the worst moments, ends as if it had never been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Run

# Stops while it writes the given line of the log, after so many bytes of it, and waits to be killed or kills itself.
STOPPED_WHILE_WRITING = """
import os, signal, sys
from longrope import cli, run

real, lines = os.write, 0

def write(descriptor, content):
    global lines
    lines += 1
    if lines < {line}:
        return real(descriptor, content)
    real(descriptor, content[:{bytes}])
    {then}

run.os.write = write
cli.main(sys.argv[1:])
"""


def searching(run: Run, folder: Path) -> list[str]:
    """Return the arguments of a search alone, with the settings of the shared run."""
    arguments = ["search", *run.arguments[1:]]
    arguments[arguments.index("--run-dir") + 1] = str(folder)
    at = arguments.index("--passkey-depths")
    return arguments[:at] + arguments[at + 2 :]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_bytes().split(b"\n")[:-1]]


@pytest.fixture(scope="module")
def killed(extended: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a search that was killed from outside, then, started again, in the middle of a line."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = searching(extended, folder)
    log = folder / "evaluations.jsonl"
    waits = STOPPED_WHILE_WRITING.format(line=9, bytes=0, then="signal.pause()")
    process = subprocess.Popen([sys.executable, "-c", waits, *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 8):
        os.sched_yield()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    first = log.read_bytes()
    assert first.count(b"\n") == 8

    program = STOPPED_WHILE_WRITING.format(line=5, bytes=40, then="os.kill(os.getpid(), signal.SIGKILL)")
    again = subprocess.run([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL, check=False)
    assert again.returncode == -signal.SIGKILL
    second = log.read_bytes()
    assert second.startswith(first), "what was there before the kill stays as it was"
    assert len(second[second.rfind(b"\n") + 1 :]) == 40, "the last line is torn"
    assert second.count(b"\n") == 12
    assert not (folder / "search.json").exists()
    return folder


def test_it_goes_on_repeats_nothing_and_finds_the_same(
    killed: Path, extended: Run, command: Callable[..., Finished]
) -> None:
    before = logged(killed)
    done = command(*searching(extended, killed))
    assert (done.code, done.err) == (0, "")
    assert "the last line was cut short when the run was killed; it is dropped" in done.out
    assert f"{len(before)} evaluations are there and are not repeated" in done.out

    after = logged(killed)
    assert after[: len(before)] == before
    keys = [record["key"] for record in after]
    assert len(keys) == len(set(keys))

    unbroken = [record for record in logged(extended.folder) if record["stage"] in ("search", "screen")]
    shared = {record["key"]: record["nll_sha256"] for record in unbroken}
    for record in after:  # the unbroken run measured some of these under another stage, before the search
        assert shared.get(record["key"], record["nll_sha256"]) == record["nll_sha256"]
    assert {record["key"] for record in unbroken} <= set(keys)

    ours, theirs = (json.loads((folder / "search.json").read_text()) for folder in (killed, extended.folder))
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs
    winners = [json.loads((folder / "factors/winner.json").read_text()) for folder in (killed, extended.folder)]
    assert winners[0]["rope"] == winners[1]["rope"]
    assert winners[0]["objective"] == winners[1]["objective"]
