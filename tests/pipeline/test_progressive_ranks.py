"""The whole method under torchrun, with a rank that dies in the second training, is that of one process.

What must agree: every forward of the weights as they came, bit for bit, and so the factors found on them. Ranks sum
gradients in another order than one process does, so losses of training, and all that is scored on the tuned weights,
agree within the rounding of that; which of two candidates as good as equal wins there may differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import run_process
from test_team import free_port

from longrope import factors
from longrope.tune import checkpoint

MODEL = Path(__file__).parents[2] / "examples" / "tiny-512"
SEARCHED, STAGES = ("search-768", "search-1024"), ("search-768", "search-1024", "search-2048", "readjust")
ASKED = (
    *("--to", "2048", "--dtype", "fp32", "--threads", "1", "--tune", "768:2,1024:2", "--tune-batch", "2"),
    *("--tune-lr", "1e-3", "--readjust", "512", "--population", "4", "--iterations", "1", "--mutations", "1"),
    *("--crossovers", "1", "--budget", "48", "--start-tokens", "0", "--attention-factor", "search", "--seed", "1"),
)
LOSS, SCORE = 2e-5, 2e-4  # nats a token: of a training step, and of what is read on the tuned weights

# Rank 0 computes none of what it has announced before another rank has brought a record. Rank 1 is killed in the first
# step of its second training, and not again where torchrun has started all anew.
PROGRAM = """
import os, signal, sys, time
from longrope import cli, team
from longrope.evaluate import scoring
from longrope.tune import loss

real, led = scoring.token_nll, []

def token_nll(*arguments):
    until = time.monotonic() + 60
    while os.environ["RANK"] == "0" and led and led[-1].waiting and time.monotonic() < until:
        if any("rank" in record for record in led[-1].log.records.values()):
            break
        time.sleep(0.01)
    return real(*arguments)

class Leader(team.Leader):
    def __init__(self, *arguments):
        led.append(self)
        super().__init__(*arguments)

step, lengths = loss.CausalLoss.forward, set()

def forward(self, input_ids, **arguments):
    lengths.add(input_ids.shape[1])
    if len(lengths) == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, input_ids, **arguments)

scoring.token_nll, team.Leader, loss.CausalLoss.forward = token_nll, Leader, forward
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One process, and two ranks of which one dies; the folders of their runs."""
    place = tmp_path_factory.mktemp("ranks")
    texts = tiny.texts(place / "texts", 7, 9000)
    asked = ["extend", str(MODEL), "--text", str(texts), *ASKED, "--run-dir"]
    alone = run_process(*asked, str(place / "alone"))
    assert alone.code == 0, alone.err
    (place / "program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    whole = [sys.executable, *torchrun, "--max-restarts", "1", str(place / "program.py"), *asked]
    done = subprocess.run([*whole, str(place / "together")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== inspect") == 2, "started anew once, and rank 0 alone speaks"
    assert done.stdout.count("report.html") == 1
    assert "spread over 2 ranks" in done.stdout
    return place / "alone", place / "together"


def stage(folder: Path, name: str, file: str) -> Any:
    return json.loads((folder / "stages" / name / file).read_text())


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "stages" / name / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_factors_for_the_weights_as_they_came_are_the_same(runs: tuple[Path, Path]) -> None:
    for name in SEARCHED:
        ours, theirs = ({one["key"]: one["nll_sha256"] for one in records(folder, name)} for folder in runs)
        assert ours == theirs
        found = [factors.read(folder / "stages" / name / "factors/winner.json")[0] for folder in runs]
        assert found[0] == found[1]
    ladders = [factors.read(folder / "factors/winner.json")[0] for folder in runs]
    assert ladders[0].lengths == ladders[1].lengths == (512, 1024, 2048)
    assert ladders[0].regimes[1024] == ladders[1].regimes[1024]


def test_losses_agree_but_for_rounding(runs: tuple[Path, Path]) -> None:
    for length in (768, 1024):
        alone, together = (stage(folder, f"tune-{length}", "tune.json") for folder in runs)
        assert len(alone["losses"]) == 2
        assert together["losses"] == pytest.approx(alone["losses"], abs=LOSS)
    for name, file in (("search-2048", "search.json"), ("readjust", "readjust-512.json")):
        seeds = [
            {one["origin"]: one["score"] for one in stage(folder, name, file)["history"] if one["generation"] == 0}
            for folder in runs
        ]
        shared = [origin for origin in seeds[0] if origin.startswith("seed ")]
        assert len(shared) >= 3
        for origin in shared:
            assert seeds[1][origin] == pytest.approx(seeds[0][origin], abs=SCORE)
    tables = [json.loads((folder / "lengths.json").read_text())["methods"] for folder in runs]
    for method in ("original", "pi", "ntk", "dynamic-ntk", "yarn"):
        assert tables[1][method] == tables[0][method], "read on the weights as they came"


def test_every_rank_had_a_part_and_nothing_was_done_twice(runs: tuple[Path, Path]) -> None:
    for name in STAGES:
        made = records(runs[1], name)
        assert any(one.get("rank") == 1 for one in made), name
        keys = [one["key"] for one in made]
        assert len(keys) == len(set(keys))
    for length in (768, 1024):
        log = (runs[1] / "stages" / f"tune-{length}" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["key"] for line in log] == ["1", "2"]
        assert checkpoint.latest(runs[1] / "stages" / f"tune-{length}" / "checkpoints") is None
    exported = json.loads((runs[1] / "export.json").read_text())
    assert exported["reload"]["passed"]
