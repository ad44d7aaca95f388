"""The offline tuner: what it tries, what it keeps, what it writes. One entry is tuned by the compiler itself."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from bench import report_gpu, tune_gpu
from bench.tune_gpu import Entry
from longrope_kernels.backends.triton import configs
from longrope_kernels.backends.triton.configs import Config

FORWARD = Entry("forward", "sm_90", "16", "128")


@pytest.fixture
def table(monkeypatch):
    fresh = copy.deepcopy(configs.table())
    monkeypatch.setattr(configs, "table", lambda: fresh)
    return fresh


def test_the_table_is_written_as_it_is_kept():
    assert tune_gpu.dumps(configs.table()) == configs.TABLE.read_text()


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("width", ["64", "128", "256", "512"])
def test_every_entry_belongs_to_a_launch_that_takes_it(table, kernel, width):
    entry = Entry(kernel, "sm_90", "16", width)
    marked = Config(16 if kernel.startswith("decode") or kernel == "split 16" else 32, 16, 4, 7)
    with tune_gpu.trying(table, entry, marked):
        launches = report_gpu.launches(entry.case)
    (launch,) = [x for x in launches if x.name == tune_gpu.LAUNCHES[kernel][1]]
    assert launch.config == marked
    assert marked not in [x.config for x in report_gpu.launches(entry.case)], "the table is as it was"


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_candidates_are_tiles_that_kernels_take(kernel):
    for entry in tune_gpu.entries(configs.table(), kernel=kernel, target=None):
        present = entry.config(configs.table())
        found = tune_gpu.candidates(kernel, entry.target, present)
        assert found[0] == present
        assert len(set(found)) == len(found) > 2
        for config in found:
            assert configs.SPLIT_KEYS % config.keys == 0
            assert not kernel.startswith("decode ") or 64 % config.keys == 0


def test_descriptors_are_tried_for_prefill_where_the_hardware_has_them(table):
    for entry in tune_gpu.entries(table):
        found = {config.descriptors for config in tune_gpu.candidates(entry.kernel, entry.target, entry.config(table))}
        assert found == (
            {False, True} if entry.kernel == "forward" and entry.target in ("sm_90", "sm_100") else {False}
        )
    wins = replace(FORWARD.config(table), descriptors=True)
    cost = lambda entry: 0.5 if entry.config(table) == wins else 1.0  # noqa: E731
    assert tune_gpu.tune(table, [FORWARD], cost, 0.1, 1.0) == {FORWARD: wins}
    written = json.loads(tune_gpu.dumps(table))
    assert FORWARD.config(written) == wins
    assert len(written["forward"]["sm_80"]["16"]["128"]) == 4


def test_the_cheapest_wins_if_it_wins_by_the_margin(table):
    wanted = Config(64, 64, 4, 3)
    before = copy.deepcopy(table)

    def cost(seconds):
        return lambda entry: seconds if entry.config(table) == wanted else 1.0

    assert tune_gpu.tune(table, [FORWARD], cost(0.95), 0.1, 1.0) == {}
    assert table == before
    assert tune_gpu.tune(table, [FORWARD], cost(0.5), 0.1, 1.0) == {FORWARD: wanted}
    assert FORWARD.config(table) == wanted
    changed = [entry for entry in tune_gpu.entries(table) if entry.config(table) != entry.config(before)]
    assert changed == [FORWARD]
    assert json.loads(tune_gpu.dumps(table)) == table


def test_a_tile_that_cannot_be_taken_is_left(table):
    present = FORWARD.config(table)
    takes = next(x for x in tune_gpu.candidates("forward", "sm_90", present) if x.warps == 4)
    cost = lambda entry: 5.0 if entry.config(table) == takes else None  # noqa: E731
    assert tune_gpu.tune(table, [FORWARD], cost, 0.1, 1.0) == {FORWARD: takes}
    assert tune_gpu.tune(table, [FORWARD], lambda entry: None, 0.1, 1.0) == {}


def test_out_of_time_nothing_changes(table):
    assert tune_gpu.tune(table, [FORWARD], lambda entry: 0.1, 0.1, -1.0) == {}


def test_the_compiler_refuses_a_tile_that_is_none(table):
    small = Entry("decode", "sm_80", "16", "64")
    assert tune_gpu.compiled_cost(small) > 0
    with tune_gpu.trying(table, small, Config(16, 3, 4, 1)):  # not a power of two: the compiler refuses
        assert tune_gpu.compiled_cost(small) is None


def test_without_a_gpu_it_says_so_and_dry_it_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "bench.tune_gpu", "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2)
    if done.returncode == 2:
        assert "no GPU" in done.stderr
    assert not (tmp_path / "table.json").exists()
    dry = [*command, "--compile-only", "--dry-run", "--minutes", "0", "--target", "sm_80", "--kernel", "decode"]
    done = subprocess.run(dry, capture_output=True, text=True, check=True)
    assert done.stdout == "8 entries, 0 changed\n"
    assert not (tmp_path / "table.json").exists()
