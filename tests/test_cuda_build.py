"""The CUDA module as nvcc builds it: what ptxas and the SASS say, and how it behaves where there is no driver."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import report_cuda
from bench.report_cuda import CONVERTERS, NVCC, compiled
from longrope_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
FORWARD = "sm80/attention_forward.cu"
DECODE, FP8_DECODE = "sm80/attention_decode.cu", "sm80/attention_decode_fp8.cu"
DECODES = [DECODE, "sm80/attention_decode_int8.cu", FP8_DECODE]
BACKWARD, WIDE_BACKWARD = "sm80/attention_backward.cu", "sm80/attention_backward_wide.cu"
HOPPER = "sm90/attention_forward.cu"
HOPPER_BACKWARD, WIDE_HOPPER_BACKWARD = "sm90/attention_backward.cu", "sm90/attention_backward_wide.cu"
KERNELS = sorted(str(x.relative_to(ROOT / "csrc" / "cuda")) for x in (ROOT / "csrc" / "cuda").rglob("*.cu"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc not found")


def sass(cubin):
    if report_cuda.cuobjdump() is None:
        pytest.skip("cuobjdump not found (the CUDA toolkit and Triton have one)")
    return report_cuda.disassembled(cubin)


def targets(source):
    if source.startswith("sm90/"):
        return ["sm_90a"]
    if source in (BACKWARD, WIDE_BACKWARD):
        return ["sm_80"]  # in whose place Hopper has its own
    return ["sm_80", "sm_89", "sm_90"] if source in CONVERTERS else ["sm_80", "sm_90"]


def cases(*quick):
    """Every kernel file with each target that it is built for."""
    return [
        pytest.param(x, target, marks=[] if (x, target) in quick else pytest.mark.slow)
        for x in KERNELS
        for target in targets(x)
    ]


@needs_nvcc
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("source", "target"), cases((FORWARD, "sm_80"), (HOPPER, "sm_90a")))
def test_kernels_keep_to_their_registers(source, target):
    _, report = compiled(source, target)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames
    assert all(frame == ("0", "0", "0") for frame in frames), report
    assert "warning" not in report


@needs_nvcc
@pytest.mark.parametrize(("source", "target"), cases((FORWARD, "sm_80"), (HOPPER, "sm_90a")))
def test_the_machine_code_has_what_the_kernels_are_made_of(source, target):
    code = sass(compiled(source, target)[0])
    assert not re.search(r"\b(LDL|STL)\b", code), "local memory"
    assert not re.search(r"\bMUFU\.(SIN|COS)\b", code), "a sine that is not ours"
    if source in (FORWARD, *DECODES, BACKWARD, WIDE_BACKWARD):
        for instruction in (r"HMMA\.16816\.F32\.BF16", r"HMMA\.16816\.F32\b", "LDSM", "LDGSTS", r"MUFU\.EX2"):
            assert re.search(instruction, code), instruction


def hopper_functions(source):
    """The kernels of a file for Hopper as SASS, by name: wgmma and bulk copies, not serialised, within their registers.

    The report would warn of serialised wgmma (C7510 or its like).
    """
    cubin, report = compiled(source, "sm_90a")
    assert "C75" not in report
    code = sass(cubin).split("Function : ")[1:]
    functions = {x.split(maxsplit=1)[0]: x for x in code}
    # The registers that setmaxnreg deals out are those of 64K that the threads begin with.
    text = (ROOT / "csrc" / "cuda" / "sm90" / "pipeline.cuh").read_text()
    (producer, consumer) = map(int, re.search(r"kProducerRegisters = (\d+), kConsumerRegisters = (\d+)", text).groups())
    (used,) = set(map(int, re.findall(r"Used (\d+) registers", report)))
    assert producer + 2 * consumer <= 3 * used
    assert 3 * 128 * used <= 64 << 10
    for x in functions.values():
        for instruction in (r"UTMALDG\.4D", r"SYNCS\.PHASECHK", r"MUFU\.EX2", r"LDGSTS", r"STG\.E\.128"):
            assert re.search(instruction, x), instruction
        assert not re.search(r"\bHMMA\b", x)
        assert source == WIDE_HOPPER_BACKWARD or not re.search(r"\bLDSM\b", x)
        assert max(map(int, re.findall(r"\bR(\d+)\b", x))) < consumer
    return functions


def columns_of(code):
    """How often a kernel multiplies with so many columns."""
    return Counter(int(x) for x in re.findall(r"HGMMA\.64x(\d+)x16\.F32", code))


@needs_nvcc
def test_the_hopper_forward_is_made_of_its_own_instructions():
    functions = hopper_functions(HOPPER)
    assert len(functions) == 8
    for code in functions.values():
        columns = set(columns_of(code))
        keys = 64 if 256 in columns else 128  # of a tile, as the widest head_dim leaves registers for
        assert keys in columns
        assert len(columns - {keys}) <= 1


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_hopper_backward_is_made_of_its_own_instructions():
    """Every product of the first tile, of the loop and of the end stands there once."""
    functions = hopper_functions(HOPPER_BACKWARD)
    assert len(functions) == 12
    for name, code in functions.items():
        (head_dim,) = map(int, re.findall(r"ELi(\d+)E", name))
        steps = head_dim // 16
        wanted = Counter()
        if "query_gradient" in name:
            wanted[128] += 2 * 2 * steps  # S and dP
            wanted[head_dim] += 2 * 8  # dq
        else:
            rows = 128 if head_dim <= 64 else 64
            wanted[rows] += 2 * 2 * steps
            wanted[head_dim] += 2 * 2 * rows // 16  # dv and dk
        assert columns_of(code) == wanted


# Instructions of a warp for a tile, by target, kernel and head_dim: docs/cuda.md has the tiles and what bounds them.
LOOP_CEILINGS = {
    ("sm_80", "forward"): {64: 640, 96: 430, 128: 490, 256: 720},
    ("sm_80", "dq"): {64: 590, 96: 700, 128: 820, 256: 870},
    ("sm_80", "dk, dv"): {64: 760, 96: 470, 128: 550, 256: 1280},
    # Where a multiprocessor has less shared memory: the tiles that are not sm_80's.
    ("sm_86", "forward"): {256: 410},
    ("sm_86", "dq"): {128: 400},
    ("sm_86", "dk, dv"): {256: 1040},
    ("sm_90a", "forward"): {64: 520, 96: 560, 128: 600, 256: 590},
    ("sm_90a", "dq"): {64: 530, 96: 605, 128: 650, 256: 690},
    ("sm_90a", "dk, dv"): {64: 645, 96: 455, 128: 510, 256: 425},
}


@needs_nvcc
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "source",
    [FORWARD, HOPPER]
    + [
        pytest.param(x, marks=pytest.mark.slow)
        for x in (BACKWARD, WIDE_BACKWARD, HOPPER_BACKWARD, WIDE_HOPPER_BACKWARD)
    ],
)
def test_a_tile_costs_few_instructions(source):
    """The loop has the products of its tile, as `Tile.cost` looks for it, and little besides."""
    found = [x for x in report_cuda.tiles() if x.source == source]
    tiles = [x for x in found if x.head_dim in LOOP_CEILINGS.get((x.target, x.label), {})]
    sass(compiled(source, tiles[0].target)[0])
    for tile in tiles:
        ceiling = LOOP_CEILINGS[tile.target, tile.label][tile.head_dim]
        assert tile.cost().instructions <= ceiling, tile


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tables_of_docs_are_what_the_report_prints():
    text = report_cuda.DOCUMENT.read_text()
    of_docs = text.split(report_cuda.BEGIN)[1].split(report_cuda.END)[0]
    if f"By nvcc {report_cuda.compiler()}," not in of_docs:
        pytest.skip("another nvcc, which may count otherwise, made the tables")
    sass(compiled(FORWARD, "sm_80")[0])
    assert of_docs == report_cuda.written(), "python -m bench.report_cuda --write"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wide_hopper_backward_is_made_of_its_own_instructions():
    """The same above head_dim 128, where the two groups of dk and dv share one code, each product once."""
    functions = hopper_functions(WIDE_HOPPER_BACKWARD)
    assert len(functions) == 4
    steps = 256 // 16
    held = 4  # steps whose left operand stays in registers
    for name, code in functions.items():
        of_query = "query_gradient" in name
        wanted = {64: 2 * 2 * steps, 256: 2 * 4} if of_query else {64: steps, 256: 4}
        assert columns_of(code) == Counter(wanted)
        assert len(re.findall(r"\bLDSM\b", code)) == (0 if of_query else held)


# Instructions of a warp for a tile, of which it has 16 keys: 64 times what a key costs a multiprocessor's schedulers.
DECODE_CEILINGS = {
    "16 bits": {64: 430, 96: 560, 128: 700, 256: 1150},
    "int8": {64: 440, 96: 590, 128: 640, 256: 1040},
    "fp8": {64: 425, 96: 570, 128: 610, 256: 970},
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_key_costs_the_decode_few_instructions():
    decodes = [x for x in report_cuda.tiles() if x.label.startswith("decode") and x.target == "sm_90"]
    assert len(decodes) == 12
    for tile in decodes:
        ceiling = DECODE_CEILINGS[tile.label.removeprefix("decode, ")][tile.head_dim]
        assert ceiling * 0.8 < tile.cost().instructions <= ceiling, (tile.label, tile.head_dim)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", targets(WIDE_BACKWARD))
def test_the_wide_backward_has_its_products_and_no_others(target):
    """Two products a warp, of which the loop holds each once: the warps of a team share the code."""
    cubin, report = compiled(WIDE_BACKWARD, target)
    functions = sass(cubin).split("Function : ")[1:]
    assert len(functions) == 2 * 3
    steps = 256 // 16
    for code in functions:
        name = code.split(maxsplit=1)[0]
        columns = 32 if "query" in name else int(*re.findall(r"ELi(\d+)E", name))  # of S: keys, or rows
        width = 128 if "query" in name else 256  # of the sums that a warp has
        products = steps * columns // 8 + columns // 16 * width // 8
        assert len(re.findall(r"\bHMMA\.16816", code)) == products
        assert len(re.findall(r"LDGSTS\.E\.BYPASS[.\w]*\.128", code)) >= 2
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) * 256 <= 64 << 10, "a block is all there is"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("source", CONVERTERS)
def test_fp8_is_converted_by_the_hardware_that_can(source, target):
    assert converts_fp8(source, target) is (target != "sm_80")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("source", [x for x in KERNELS if x not in CONVERTERS])
def test_what_has_no_binary_for_sm_89_converts_no_fp8(source):
    assert not converts_fp8(source, targets(source)[-1])


def converts_fp8(source, target):
    return bool(re.search(r"\bF2F\w*\.[\w.]*E4M3", sass(compiled(source, target)[0])))


@needs_nvcc
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake not found")
def test_every_gpu_finds_an_image_of_every_kernel(tmp_path):
    """A binary for its major version and no later minor one; a newer GPU compiles PTX."""
    pybind11 = pytest.importorskip("pybind11")
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DLONGROPE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    result = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seen = {}
    for command in json.loads((tmp_path / "compile_commands.json").read_text()):
        source = Path(command["file"])
        if source.suffix == ".cu":
            seen[str(source.relative_to(ROOT / "csrc" / "cuda"))] = set(
                re.findall(r"\b(?:sm|compute)_\w+", " ".join(re.findall(r"code=\S+", command["command"])))
            )
    assert sorted(seen) == KERNELS
    for source, images in seen.items():
        assert {x for x in images if x.startswith("sm_")} == set(targets(source)), source
        if source.startswith("sm90/"):
            continue  # no other GPU runs these
        assert images & {"compute_80", "compute_89"}, source
        for major, minor in ((8, 0), (8, 6), (8, 7), (8, 9), *([(9, 0)] if "sm_90" in targets(source) else [])):
            assert any(f"sm_{major}{x}" in images for x in range(minor + 1)), (source, major, minor)


@needs_nvcc
def test_nvcc_finds_all_that_the_bindings_name(tmp_path):
    """For the emulator they include more, and no kernel is compiled with them."""
    pybind11 = pytest.importorskip("pybind11")
    folders = [sysconfig.get_paths()["include"], pybind11.get_include()]
    command = [NVCC, "-std=c++17", "-x", "cu", "--cuda", "-arch=sm_80", "-DLONGROPE_MODULE=_cuda"]
    command += [f"-I{x}" for x in folders] + [
        ROOT / "csrc" / "bindings" / "cuda_module.cpp",
        "-o",
        tmp_path / "host.ii",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_nvcc
def test_bulk_memory_is_accessed_16_bytes_at_a_time():
    code = sass(compiled(FORWARD, "sm_80")[0])
    assert re.search(r"LDGSTS\.E\.BYPASS\.128", code) or re.search(r"LDGSTS\.E\.BYPASS.*\.128", code)
    assert re.search(r"STG\.E\.128", code)
    assert re.search(r"LDSM\.16\.MT88\.4", code), "ldmatrix.x4.trans"


# What a process without a driver is told, before any memory is touched, by the backend and by the module itself.
ON_USE = """
import torch

import longrope_kernels as lk
from longrope_kernels.backends import cuda

print(cuda._native.__file__)
print(cuda.unavailable_reason())
q = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
try:
    lk.apply_rope(q, q, lk.RopeScaling(64, 1e4), backend="cuda")
except lk.BackendUnavailableError as error:
    print(error)
tensor, absent = ((1, 1, 1, 1), (1, 1, 1, 1), 1, 1, 1, 1), ((0, 0, 0, 0), (0, 0, 0, 0), 0, 0, 0, 0)
try:
    cuda._native.apply_rope(tensor, absent, (0, 0, 0, 0, 0, 32, 0), 1, 64, 1, False, 0)
except RuntimeError as error:
    print(error)
"""


def says_on_use_that_there_is_no_driver(packages):
    """Run `ON_USE` with the packages of a folder in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(
        [sys.executable, "-c", ON_USE], capture_output=True, text=True, check=False, cwd=packages, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    module, reason, refused, raised = done.stdout.splitlines()
    assert Path(module).parent == Path(packages) / "longrope_kernels"
    assert reason == "no NVIDIA GPU that torch can use"
    assert refused.startswith("backend: got 'cuda'")
    assert reason in refused
    assert re.search(r"driver|no CUDA-capable device", raised)


@pytest.mark.skipif(cuda._native is None or torch.cuda.is_available(), reason="needs the module and no GPU")
def test_without_a_driver_the_module_imports_and_says_so_on_use():
    says_on_use_that_there_is_no_driver(ROOT)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake not found")
def test_an_installation_builds_the_module_in_minutes(tmp_path):
    """As pip runs setup.py where nvcc is at hand, both modules from nothing: under 5 minutes on 2 cores.

    What is held to that are the seconds of the processors: those of other work are not among them, though it takes
    caches from the build.
    """
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "longrope_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"LONGROPE_KERNELS_BUILD": "1", "LONGROPE_KERNELS_CUDA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    print(f"_cpu and _cuda: {time.monotonic() - began:.0f} s, {spent:.0f} s of processors")
    assert spent < 2 * 300
    (module,) = (tmp_path / "longrope_kernels").glob("_cuda*.so")
    # The static runtime, no torch: one binary for all of its versions.
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcudart|libcuda|libtorch|libc10", needed), needed
    if not torch.cuda.is_available():
        says_on_use_that_there_is_no_driver(tmp_path)
