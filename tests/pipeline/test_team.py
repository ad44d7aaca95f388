"""A search whose forwards are spread over ranks is the search of one rank, also when a rank dies on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, Run
from test_killed_search import logged, searching

from longrope import team
from longrope.errors import PipelineError, UsageError
from longrope.progressive import stages

# Rank 0 computes nothing before rank 1 has put so many records into the log. Rank 1 is killed in its n-th forward, and
# where torchrun starts all anew not again.
PROGRAM = """
import os, signal, sys, time
from longrope import cli, context, team
from longrope.evaluate import scoring

wanted, fatal = int(sys.argv.pop(1)), int(sys.argv.pop(1))
real, count, logs = scoring.token_nll, 0, []

def token_nll(*arguments):
    global count
    count += 1
    if os.environ["RANK"] == "0":
        while sum("rank" in record for record in logs[0].records.values()) < wanted:
            time.sleep(0.01)
    elif count == fatal and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        time.sleep(0.5)  # in the forward; what it finished before has been logged by then
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

class Crew(team.Crew):
    def __init__(self, store, ranks):
        super().__init__(store, ranks, patience=2.0)

    def lead(self, job, log):
        logs.append(log)
        return super().lead(job, log)

scoring.token_nll = token_nll
context.Crew = Crew
cli.main(sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def assert_the_same_search(folder: Path, alone: Path) -> None:
    """All but times: every score of every candidate in the same order, the winner, what was spent."""
    ours, theirs = (json.loads((one / "search.json").read_text()) for one in (folder, alone))
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs
    winners = [json.loads((one / "factors/winner.json").read_text()) for one in (folder, alone)]
    assert winners[0]["rope"] == winners[1]["rope"]
    bits: list[dict[str, Any]] = [
        {record["key"]: record.get("nll_sha256") for record in logged(one)} for one in (folder, alone)
    ]
    assert bits[0].items() <= bits[1].items()


def test_two_ranks_under_torchrun_started_anew_after_a_kill_find_what_one_finds(extended: Run, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    program = (tmp_path / "program.py", "4", "3", *searching(extended, tmp_path / "run"))
    whole = [sys.executable, *torchrun, "--max-restarts", "1", *map(str, program)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" evaluations are there and are not repeated") == 1
    assert done.stdout.count("Search done") == 1, "the other rank is silent"
    assert sum("rank" in record for record in logged(tmp_path / "run")) >= 4
    assert_the_same_search(tmp_path / "run", extended.folder)


def test_a_rank_that_is_killed_costs_its_candidate_alone(extended: Run, tmp_path: Path) -> None:
    port, folder = str(free_port()), tmp_path / "run"
    ranks = []
    for rank in (0, 1):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        program = [sys.executable, "-c", PROGRAM, "1", "2", *searching(extended, folder)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(program, env={**os.environ, **place}, **pipes))
    (_, said), _ = (one.communicate() for one in ranks)
    assert [one.returncode for one in ranks] == [0, -signal.SIGKILL], said
    records = logged(folder)
    assert [record["rank"] for record in records if "rank" in record] == [1], "what it had finished is kept"
    keys = [record["key"] for record in records]
    assert len(keys) == len(set(keys)), "nothing is logged twice"
    assert_the_same_search(folder, extended.folder)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this process rank 1 of a job in this process; return its store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(team, "meet", lambda: store)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return store


def test_a_rank_that_has_other_weights_is_refused(
    worker: Any, model_folder: Path, command: Callable[..., Finished]
) -> None:
    job = {"kind": team.FORWARDS, "model": None, "model_fingerprint": "0123456789abcdef"}
    team.part_of(worker, 1).set(team.JOB, json.dumps(job))
    done = command("search", model_folder, "--to", "256")
    assert done.code == 2
    assert done.err.startswith(f"longrope: MODEL: got {model_folder} with fingerprint ")
    assert done.err.endswith("on rank 1, expected 0123456789abcdef, as on rank 0\n")


def test_a_rank_goes_home_when_there_is_nothing_to_do(
    worker: Any, model_folder: Path, command: Callable[..., Finished]
) -> None:
    missed, last = (team.part_of(worker, number) for number in (1, 2))
    missed.set(team.JOB, json.dumps({"kind": team.FORWARDS, "model": "gone", "model_fingerprint": "0"}))
    missed.set(team.DONE, "1")  # over before this rank came to it: it does not load the model
    last.set(team.JOB, json.dumps({"kind": team.END}))
    done = command("extend", model_folder, "--to", "256")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert missed.check(["longrope/left/1"])
    assert last.check(["longrope/left/1"])


def test_a_training_is_not_begun_without_a_rank_that_has_died() -> None:
    store = torch.distributed.HashStore()
    store.set("longrope/beat/1", "7")
    crew = team.Crew(store, 2, patience=0.2)
    assert crew.alive(1)
    with pytest.raises(
        PipelineError, match=r"^rank 1: got no sign of life for 0.2 seconds, expected it to train; what"
    ):
        crew.train({"model": None})


def test_ranks_train_on_the_same_text_or_not_at_all(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    job = {"sources": [str(text_folder)], "taken": [], "text": "that of rank 0"}
    with pytest.raises(UsageError, match=r"^--text: got other documents on rank 1 than on rank 0, expected the same"):
        stages.train_along(None, job)  # type: ignore[arg-type]


def test_a_forward_is_claimed_once() -> None:
    store = torch.distributed.HashStore()
    assert [team.claim(store, 0, rank) for rank in (2, 1, 0)] == [True, False, False]
    assert team.claim(store, 1, 1)


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch, command: Callable[..., Finished]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert team.rank() == (0, 1)
    monkeypatch.setenv("RANK", "one")
    done = command("search", "smollm2", "--to", "16384")
    assert (done.code, done.err) == (2, "longrope: RANK: got 'one', expected a number, as torchrun sets it\n")
