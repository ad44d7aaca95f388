"""`bench/gpu.sh` where there is no GPU: every part runs dry, a part that fails stops no other."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu  # needs Triton

SCRIPT = pathlib.Path(__file__).parent.parent / "bench/gpu.sh"
PARTS = ["environment", "build", "layouts", "conformance", "memcheck", "synccheck", "racecheck", "benchmark"]


def run(folder, *flags, **environment):
    done = subprocess.run(
        [str(SCRIPT), str(folder), *flags],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )
    summary = folder / "summary.txt"
    return done, [line.split(maxsplit=2) for line in summary.read_text().splitlines()] if summary.exists() else []


@pytest.mark.timeout(900)
def test_a_dry_run_takes_every_step(tmp_path):
    done, lines = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name, _, _ in lines] == PARTS
    for name, _, verdict in lines:
        skipped = verdict.startswith("skipped: dry run") and name in ("build", "synccheck", "racecheck")
        assert skipped or verdict == "ok", (name, verdict)
    assert json.loads((tmp_path / "layouts.json").read_text())["device"] == "emulator"
    smoke = (tmp_path / "memcheck.log").read_text()
    assert "triton: largest error" in smoke
    assert "cuda: largest error" in smoke
    assert "cuda, kernels of Ampere: largest error" in smoke
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["complete"]
    assert content["dry_run"]
    decode = {"decode", "decode int8", "decode fp8"}
    append = {x.replace("decode", "append") for x in decode}
    assert {row["section"] for row in content["rows"]} == {
        *("forward", "backward", *decode, "rope", *append, "long forward"),
    }
    for row in content["rows"]:
        assert "refused" not in row
        assert row["seconds"]["ours"] > 0
        assert set(row["ceilings"]) <= {"matmul", "copy"}
    forward, backward = (
        row["seconds"].keys() | row["notes"].keys()
        for section in ("forward", "backward")
        for row in content["rows"]
        if row["section"] == section
    )
    everywhere = {"FlexAttention", "flash-attn-4", "ours, CUDA kernels", "ours, CUDA kernels of Ampere"}
    assert everywhere <= backward
    assert everywhere | {"SDPA flash", "SDPA cuDNN", "ours, tensor descriptors"} <= forward


def test_the_limits_of_the_parts_fit_into_the_whole():
    """Whatever each of them takes, the benchmarks at the end have six minutes of 20."""
    limits = dict(re.findall(r"^(?:part|shell) (\w+) (\d+|rest) ", SCRIPT.read_text(), re.MULTILINE))
    assert list(limits) == PARTS
    assert limits.pop("benchmark") == "rest"
    assert sum(map(int, limits.values())) + 6 * 60 <= 20 * 60


def test_what_is_measured_on_a_gpu_has_every_head_dim_and_two_million_tokens():
    names = [name for name, _ in gpu.works(gpu.GPU)]
    for made in ("forward", "backward"):
        assert {f"{made} {x} 16384" for x in (64, 96, 128)} | {f"{made} 256 8192"} <= set(names)
    assert "long_forward 128 2097152" in names


def test_a_part_that_fails_stops_no_other(tmp_path):
    done, lines = run(tmp_path, "--dry-run", PYTHON="false")
    assert done.returncode == 1
    assert [name for name, _, _ in lines] == PARTS
    failed = {name for name, _, verdict in lines if verdict.startswith("failed (1)")}
    assert failed == {"layouts", "conformance", "benchmark", "memcheck"}


def test_what_no_time_is_left_for_is_said(tmp_path):
    done, lines = run(tmp_path, "--dry-run", MINUTES="0")
    assert done.returncode == 1
    assert {verdict for _, _, verdict in lines} == {"not run: 0 minutes are over"}


@pytest.mark.parametrize("arguments", [[], ["--wet"]])
def test_wrong_arguments_are_refused(tmp_path, arguments):
    command = [str(SCRIPT), *([str(tmp_path / "out"), *arguments] if arguments else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "usage: bench/gpu.sh OUTDIR [--dry-run]\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so():
    command = [sys.executable, "-m", "bench.gpu", "--out", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parent.parent)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
