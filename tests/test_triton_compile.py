"""The Triton kernels compiled ahead of time for GPUs that are not here: no spills, tensor cores, shared memory."""

import dataclasses
import itertools
import json
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from bench import report_gpu
from longrope_kernels.backends.triton import configs, descriptors
from longrope_kernels.backends.triton.configs import Config


def compile_all(cases, jobs=1):
    """Compile everything before anything is refused, so that one run names all that is wrong."""
    rows = list(report_gpu.reports(cases, jobs))
    faults = [fault for row in rows for fault in row.faults]
    assert not faults, f"{len(faults)} of {len(rows)} kernels:\n" + "\n".join(faults)
    return len(rows)


def report_of(target="sm_90", config=(128, 64, 8, 2), **changes):
    sound = report_gpu.Report(
        target, "forward, bfloat16", "forward_kernel", Config(*config), 200, 0, 65536, 16, 16, 3000
    )
    return dataclasses.replace(sound, **changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spill_bytes": 48}, "48 bytes of local memory"),
        ({"shared_bytes": 228 * 1024}, "233472 bytes of shared memory, of 232448"),
        ({"matmuls": 0, "group_matmuls": 0}, "no tensor-core instruction"),
        ({"matmuls": 0, "case": "forward, float32"}, None),
        ({"matmuls": 0, "kernel": "append_kernel"}, None),
        ({"error": "PTXASError: no", "matmuls": 0}, "does not compile: PTXASError: no"),
        ({"group_matmuls": 12}, "4 of 16 tensor-core instructions are not wgmma"),
        ({"group_matmuls": 0, "target": "sm_80", "shared_bytes": 0}, None),
    ],
)
def test_what_a_kernel_must_not_have_is_a_line(changes, fault):
    where = "sm_90 forward_kernel (forward, bfloat16, tile 128 x 64, 8 warps)"
    assert report_of(**changes).faults == ([] if fault is None else [f"{where}: {fault}"])


@pytest.mark.parametrize(
    ("kernel", "tile", "refused"),
    [
        ("forward_kernel", (32, 64), False),
        ("backward_query_kernel", (32, 128), False),
        ("backward_query_kernel", (64, 16), True),
        ("backward_key_kernel", (64, 32), False),
        ("backward_key_kernel", (32, 64), True),
    ],
)
def test_products_of_64_rows_are_wgmma_on_hopper_and_smaller_ones_need_not(kernel, tile, refused):
    """The rows of a product: those of the tile, and its keys where dk and dv are computed."""
    row = report_of(config=(*tile, 8, 2), kernel=kernel, group_matmuls=0)
    assert bool(row.faults) == refused


def test_tensor_cores_are_known_by_their_sass():
    for pattern, opcodes in {
        report_gpu.WARP_MATMUL: ["HMMA", "IMMA", "QMMA"],
        report_gpu.GROUP_MATMUL: ["HGMMA", "IGMMA", "UTCHMMA", "UTCQMMA"],
    }.items():
        assert [x for x in (*opcodes, "FFMA", "UTMALDG", "UTCBAR", "HFMA2") if pattern.fullmatch(x)] == opcodes


@pytest.fixture
def one_ceiling(monkeypatch, tmp_path):
    """A file of ceilings with one kernel, as it is written."""
    monkeypatch.setattr(report_gpu, "CEILINGS", tmp_path / "ceilings.json")
    sound = report_of("gfx942", shared_bytes=1024)
    report_gpu.write_ceilings([sound])
    yield sound
    report_gpu.ceilings.cache_clear()


@pytest.mark.parametrize("what", report_gpu.BOUNDED)
def test_a_kernel_above_its_ceiling_is_refused(one_ceiling, what):
    assert one_ceiling.faults == []
    had = getattr(one_ceiling, what)
    more = dataclasses.replace(one_ceiling, **{what: had + 1})
    assert any(f": {had + 1} {what.replace('_', ' ')}, of {had} in ceilings.json" in fault for fault in more.faults)
    if had:
        assert dataclasses.replace(one_ceiling, **{what: had - 1}).faults == []


def test_a_kernel_without_a_ceiling_is_refused(one_ceiling):
    (fault,) = dataclasses.replace(one_ceiling, case="another").faults
    assert "no ceiling in ceilings.json (python -m bench.report_gpu --ceilings writes them)" in fault
    assert dataclasses.replace(one_ceiling, target="sm_90", case="another").faults == []


def test_scratch_is_refused_but_for_what_a_ceiling_has_of_it(one_ceiling):
    spilled = dataclasses.replace(one_ceiling, spill_bytes=48)
    assert any("48 spill bytes, of 0 in ceilings.json" in fault for fault in spilled.faults)
    fault, _ = dataclasses.replace(spilled, case="another").faults
    assert "48 bytes of local memory" in fault
    report_gpu.write_ceilings([spilled])
    assert spilled.faults == []
    (fault,) = dataclasses.replace(spilled, spill_bytes=52).faults
    assert "52 spill bytes, of 48 in ceilings.json" in fault
    assert len(dataclasses.replace(spilled, target="sm_90", group_matmuls=16).faults) == 1


def test_one_kernel_of_gfx942_may_keep_something_in_scratch():
    """docs/triton.md says which, and why; whoever writes the ceilings anew and finds another has to mend it."""
    kernels = json.loads(report_gpu.CEILINGS.read_text())["kernels"]
    assert {name: held["spill_bytes"] for name, held in kernels.items() if held["spill_bytes"]} == {
        "backward_key_kernel (backward, head_dim 256, float32, rotary 64)": 48
    }


def test_ceilings_of_another_triton_hold_nothing(one_ceiling):
    written = json.loads(report_gpu.CEILINGS.read_text())
    report_gpu.CEILINGS.write_text(json.dumps(written | {"triton": "0.0"}))
    report_gpu.ceilings.cache_clear()
    assert dataclasses.replace(one_ceiling, instructions=10**6).faults == []


@pytest.mark.skipif("gfx942" not in report_gpu.TARGETS, reason="this Triton does not compile for gfx942")
def test_every_kernel_of_gfx942_has_a_ceiling_and_no_other():
    cases = (case for case in report_gpu.all_cases() if case.target == "gfx942")
    names = [f"{launch.name} ({case.label})" for case, _, launch in report_gpu.distinct(cases)]
    assert len(set(names)) == len(names), "a name stands for one kernel"
    assert set(json.loads(report_gpu.CEILINGS.read_text())["kernels"]) == set(names)


def test_every_entry_of_the_table_is_taken_by_a_case(monkeypatch):
    """Each entry gets a number of warps that is its own, and the launches say which they took."""
    number = itertools.count(1000)
    entries = [entry for entry in report_gpu.entries(configs.table()) if entry.target in report_gpu.TARGETS]
    numbered = {entry: next(number) for entry in entries}
    table = json.loads(configs.TABLE.read_text())
    for entry, warps in numbered.items():
        table[entry.kernel][entry.target][entry.bits][entry.width] = [16, 16, warps, 1]
    monkeypatch.setattr(configs, "table", lambda: table)
    taken = {launch.config.warps for case in report_gpu.all_cases() for launch in report_gpu.launches(case)}
    assert [entry for entry, warps in numbered.items() if warps not in taken] == []


def test_a_kernel_that_does_not_compile_does_not_hide_the_others(monkeypatch):
    def refuses(launch, target):
        raise RuntimeError(f"no\n{launch.name}")

    monkeypatch.setattr(report_gpu, "compile_launch", refuses)
    rows = list(report_gpu.reports([report_gpu.Case("sm_90", "backward")]))
    assert [row.error for row in rows] == [f"RuntimeError: no {row.kernel}" for row in rows]
    assert len(rows) == 4
    with pytest.raises(AssertionError, match=r"4 of 4 kernels:\s+sm_90 delta_kernel.*\s+sm_90 rotate_kernel"):
        compile_all([report_gpu.Case("sm_90", "backward")])


def test_a_sample_compiles_without_spills_and_onto_tensor_cores():
    assert compile_all(report_gpu.quick_cases()) >= 20


def test_the_widest_tile_of_ampere_fits_the_chips_that_share_it():
    """sm_86, sm_89 and generation 12 have 99 KB where sm_80 has 163."""
    (launch,) = [x for x in report_gpu.launches(report_gpu.Case("sm_80", "forward", 256)) if x.name == "forward_kernel"]
    found = report_gpu.report(launch, "sm_80", "head_dim 256")
    assert not found.faults
    assert found.shared_bytes <= 99 * 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", report_gpu.TARGETS)
def test_every_configuration_compiles(target):
    cases = (case for case in report_gpu.all_cases() if case.target == target)
    assert compile_all(cases, len(os.sched_getaffinity(0))) >= 200


def test_hopper_prefill_runs_on_wgmma_and_waits_for_nothing_but_its_loads():
    for launch in report_gpu.launches(report_gpu.Case("sm_90", "forward")):
        if launch.name == "forward_kernel":
            ptx = report_gpu.compile_launch(launch, "sm_90").asm["ptx"]
            assert re.search(r"wgmma\.mma_async\S*\.bf16\.bf16", ptx)
            assert "cp.async" in ptx
            assert not re.search(r"\b(sin|cos)\.approx", ptx)


def whole_forward(target, width, descriptors):
    """The launch of a whole forward with its present tile."""
    entry = report_gpu.Entry("forward", target, "16", width)
    with configs.by_descriptors(descriptors):
        (launch,) = [x for x in report_gpu.launches(entry.case) if x.name == "forward_kernel"]
    assert launch.config.descriptors == descriptors
    return launch


@pytest.mark.skipif(descriptors.TensorDescriptor is None, reason="Triton before 3.4 has no tensor descriptors")
@pytest.mark.parametrize("width", ["128", *(pytest.param(str(w), marks=pytest.mark.slow) for w in (64, 256, 512))])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_keys_through_descriptors_come_by_bulk_copies_and_nothing_spills(target, width):
    launch = whole_forward(target, width, descriptors=True)
    assert report_gpu.report(launch, target, f"width {width}").faults == []
    bulk = r"cp\.async\.bulk\.tensor\.\dd"
    assert re.search(bulk, report_gpu.compile_launch(launch, target).asm["ptx"])
    plain = whole_forward(target, width, descriptors=False)
    assert not re.search(bulk, report_gpu.compile_launch(plain, target).asm["ptx"])


@pytest.mark.parametrize(("target", "converts"), [("sm_80", False), ("sm_89", True), ("sm_90", True)])
def test_fp8_is_read_by_conversions_of_chips_that_have_them(target, converts):
    launch = report_gpu.launches(report_gpu.Case(target, "fp8", head_dim=64))[0]
    ptx = report_gpu.compile_launch(launch, target).asm["ptx"]
    assert bool(re.search(r"cvt\.rn\.f16x2\.e4m3x2", ptx)) == converts
    assert converts or "e4m3" not in ptx


@pytest.mark.parametrize("op", report_gpu.OPS)
def test_a_launch_has_the_arguments_of_its_kernel_and_no_other(op):
    """What Triton's launcher does on a GPU: it refuses a name that is neither a parameter nor an option."""
    for launch in report_gpu.launches(report_gpu.Case("sm_90", op)):
        assert list(launch.arguments) == [parameter.name for parameter in launch.kernel.params]
        assert launch.grid
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in launch.grid)
        assert len(launch.grid) == 1 or launch.grid[1] < 2**16


def run_time_types(launch, compiled):
    """Types of the parameters that remain at run time, by name. The compiled function has them in order; old Tritons
    write no names there."""
    arguments = re.search(r"tt\.func public @\w+\((.*)\) attributes", compiled.asm["ttir"])[1]
    constant = lambda p: p.is_constexpr or any(launch.arguments[p.name] is x for x in (None, 1))  # noqa: E731
    names = [p.name for p in launch.kernel.params if not constant(p)]
    return dict(zip(names, re.findall(r"%\w+: ([^\s,]+)", arguments), strict=True))


def test_strides_past_32_bits_are_64_bit_arguments():
    case = report_gpu.Case("sm_80", "forward", head_dim=64)
    launch = next(x for x in report_gpu.launches(case) if x.name == "forward_kernel")
    for name in ("query", "key", "value"):
        launch.arguments[f"{name}_token_stride"] = 2**33
    compiled = report_gpu.compile_launch(launch, "sm_80")
    assert len(re.findall(r"\.param \.u64", compiled.asm["ptx"])) >= len(
        [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    )
    types = run_time_types(launch, compiled)
    assert [types[f"{name}_token_stride"] for name in ("query", "key", "value")] == ["i64"] * 3
    assert types["query_head_stride"] == "i32"
