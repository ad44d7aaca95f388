"""The Triton backend where there is no GPU: its interpreter in another process, its choices, its refusals."""

import inspect
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import backends
from longrope_kernels.bundles import KEY_GROUP

pytest.importorskip("triton")

from longrope_kernels.backends.triton import configs, launch
from longrope_kernels.backends.triton.forward import forward_kernel

interpreted = pytest.mark.skipif(launch.interpreter_reason() is not None, reason=str(launch.interpreter_reason()))
INTERPRETED = pathlib.Path(__file__).with_name("test_triton_interpreter.py")


def interpret(*arguments):
    """TRITON_INTERPRET must be set before triton is imported, which torch may have done in this process."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *map(str, arguments)]
    path = os.pathsep.join((str(INTERPRETED.parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@interpreted
def test_interpreted_kernels_conform():
    assert " passed" in interpret("-m", "not slow", INTERPRETED)


@interpreted
def test_interpreted_kernels_rotate_in_place():
    # The reference has its own run; bfloat16 the interpreter has wrong.
    file = INTERPRETED.with_name("test_rope_in_place.py")
    assert " passed" in interpret("-p", "interpreted", "-k", "not reference and not bfloat16", file)


@interpreted
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_kernels_conform_thoroughly():
    assert " passed" in interpret("-m", "slow", INTERPRETED)


@interpreted
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interpreted_kernels_pass_the_tests_of_caches_and_packed_batches():
    files = [INTERPRETED.with_name(name) for name in ("test_cache.py", "test_varlen.py")]
    # Too many drawn problems for the interpreter, and bfloat16, which it has wrong.
    left_out = "not error_rule and not bits_it_gives_alone and not dtype2 and not bfloat16"
    assert " passed" in interpret("-p", "interpreted", "-k", left_out, *files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why():
    assert "no GPU" in backends.unavailable_reason("triton")
    q = torch.randn(1, 1, 2, 32)
    with pytest.raises(lk.BackendUnavailableError, match="TRITON_INTERPRET"):
        lk.attention(q, q, q, backend="triton")


def test_a_triton_that_does_not_know_the_gpu_says_which_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(launch, "TRITON", (3, 3))
    assert backends.unavailable_reason("triton") is None
    monkeypatch.setattr(launch, "TRITON", (3, 2))
    assert "Triton 3.2 knows no GPU of compute capability 12, expected 3.3" in backends.unavailable_reason("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backends.unavailable_reason("triton") is None


def test_a_gpu_before_ampere_is_named_with_what_was_expected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5, expected 8.0 (Ampere)" in backends.unavailable_reason("triton")


def test_an_old_interpreter_says_which_numpy_it_wants(monkeypatch):
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    for triton_version, numpy_version in (((3, 6), "2.3.5"), ((3, 7), "2.4.6"), ((3, 5), "2.4.6")):
        monkeypatch.setattr(launch, "TRITON", triton_version)
        monkeypatch.setattr(launch.numpy, "__version__", numpy_version)
        reason = backends.unavailable_reason("triton")
        assert (reason is None) == (triton_version != (3, 5))
    assert "Triton 3.5 cannot interpret with NumPy 2.4, expected NumPy before 2.4" in reason


def test_is_first_for_gpu_tensors():
    assert backends.PREFERENCE["cuda"][0] == "triton"


@pytest.mark.parametrize(("dims", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32), (40, 64), (128, 128)])
def test_padding(dims, padded):
    assert configs.pad(dims) == padded


def test_configurations_depend_on_rows_not_on_keys():
    assert configs.splits_keys(1)
    assert configs.splits_keys(configs.SPLIT_ROWS)
    assert not configs.splits_keys(configs.SPLIT_ROWS + 1)
    assert configs.rotates_in_tile(configs.IN_TILE_ROWS)
    assert not configs.rotates_in_tile(configs.IN_TILE_ROWS + 1)


def test_descriptors_are_taken_where_they_are_asked_for_and_the_hardware_has_them():
    for target in configs.TARGETS:
        has = target in ("sm_90", "sm_100", "interpreter")
        for wanted in (True, False):
            with configs.by_descriptors(wanted):
                assert configs.forward(target, 128, 2, plain=True).descriptors == (has and wanted)
        assert configs.forward(target, 128, 2, plain=True) == configs._chosen("forward", target, 128, 2)
    assert configs.Config(128, 64, 8, 2).to_list() == [128, 64, 8, 2]
    assert configs.Config.of_list([128, 64, 8, 2, True]) == configs.Config(128, 64, 8, 2, True)


def test_the_assembler_is_told_what_an_entry_says_where_triton_passes_it_on(monkeypatch):
    entry = [32, 16, 8, 2, "--opt-level 1"]
    config = configs.Config.of_list(entry)
    assert config.to_list() == entry
    assert not config.descriptors
    named = launch.Launch(forward_kernel, (1,), dict.fromkeys(inspect.signature(forward_kernel.fn).parameters), config)
    for version, told in (((3, 3), False), ((3, 4), True)):
        monkeypatch.setattr(launch, "TRITON", version)
        assert ("ptx_options" in named.options) == told
    assert "ptx_options" not in replace(named, config=configs.Config(32, 16, 8, 2)).options


@pytest.mark.parametrize("target", configs.TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [32, 64, 128, 256, 512])
def test_configurations_are_tiles_that_kernels_take(target, itemsize, width):
    chosen = [configs.forward_split(target, width, itemsize, rows) for rows in (1, 17, 64)]
    flagged = (configs.forward, configs.backward_query, configs.backward_key)
    chosen += [function(target, width, itemsize, flag) for function in flagged for flag in (False, True)]
    chosen += [configs.decode(target, width, itemsize, quantised) for quantised in ("", "int8", "fp8")]
    for config in chosen:
        for tile in (config.rows, config.keys):
            assert tile >= 16
            assert tile & (tile - 1) == 0
        assert configs.SPLIT_KEYS % config.keys == 0
        assert config.warps in (4, 8)
    # A block of keys of a quantised cache lies in one group.
    chosen += [configs.forward(target, width, itemsize, False, quantised) for quantised in ("int8", "fp8")]
    for config in (*chosen[:3], *chosen[-4:]):
        assert KEY_GROUP % config.keys == 0


def test_the_table_of_configurations_has_every_kernel_on_every_target():
    table = configs.table()
    assert tuple(table) == configs.KERNELS
    for kernel, targets in table.items():
        assert (*targets, "interpreter") == configs.TARGETS, kernel
        for sizes in targets.values():
            assert {bits: tuple(map(int, widths)) for bits, widths in sizes.items()} == {
                "16": configs.WIDTHS,
                "32": configs.WIDTHS,
            }
