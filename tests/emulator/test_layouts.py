"""The emulator against layouts that a GPU dumped (`bench/gpu.sh`): a witness that has not read the manual with us."""

import json

import pytest

from bench import layouts

from . import build

DUMPED = build.ROOT / "bench" / "results" / "gpu" / "layouts.json"


def test_every_probe_runs_in_the_emulator_and_twice_alike(emulator):
    emulator.seed(0)
    first = layouts.dump(emulator, "cpu", True)
    emulator.seed(7)
    assert layouts.dump(emulator, "cpu", True) == first
    digests = [x["sha256"] for name, x in first.items() if name.startswith("wgmma")]
    assert len(set(digests)) > len(digests) // 2


@pytest.mark.skipif(not DUMPED.exists(), reason="no GPU has dumped its layouts yet")
def test_the_emulator_does_what_the_gpu_did(emulator):
    emulator.seed(0)
    ours = layouts.dump(emulator, "cpu", True)
    for name, probe in json.loads(DUMPED.read_text())["probes"].items():
        assert ours[name] == probe, name
