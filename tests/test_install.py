"""Installing with and without a compiler, and what the package says and does where its kernels are missing."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from longrope_kernels.backends import cpu

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")


def run(*command, cwd=ROOT, **environment):
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def without_kernels(program):
    """Run `program` in a process where the native module cannot be imported."""
    hidden = "import sys; sys.modules['longrope_kernels._cpu'] = None\n"
    packages = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    return run(sys.executable, "-c", hidden + program, PYTHONPATH=packages)


def test_without_kernels_every_op_runs_on_the_reference_and_one_warning_says_so():
    done = without_kernels("""
import torch
import longrope_kernels as lk
scaling = lk.RopeScaling(head_dim=32, theta=1e4)
q, k, v = (torch.randn(1, heads, 9, 32, requires_grad=True) for heads in (4, 2, 2))
out = lk.attention(q, k, v, scaling)
assert torch.equal(out, lk.attention(q, k, v, scaling, backend="reference"))
out.sum().backward()
lk.apply_rope(q, k, scaling)
lk.attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), torch.tensor([0, 4, 9]), scaling=scaling)
cache = lk.KVCache(1, 2, 32, 64, torch.float32, quantised=True)
cache.append(k, v)
cache.attend(q, scaling)
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "runs on the fp64 reference backend, up to 100 times slower than a kernel" in done.stderr
    assert "(cpu: the native module is not built: install g++, then install this package again" in done.stderr
    assert "LONGROPE_KERNELS_BUILD=1" in done.stderr


def test_without_kernels_the_cpu_backend_by_name_is_refused():
    done = without_kernels("""
import torch
import longrope_kernels as lk
try:
    lk.attention(*[torch.randn(1, 1, 4, 32)] * 3, lk.RopeScaling(head_dim=32, theta=1e4), backend="cpu")
except lk.BackendUnavailableError as error:
    print(error)
""")
    assert done.stderr == ""
    assert done.stdout.startswith(
        "backend: got 'cpu', expected one that can run attention here: the native module is not"
    )
    assert done.stdout.count("\n") == 1


def test_doctor_says_that_the_kernels_are_missing_and_how_to_get_them():
    pytest.importorskip("typer", reason="needs the pipeline extra")
    done = without_kernels("from longrope.cli import main; main(['doctor'])")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("backend cpu"))
    assert "not usable: the native module is not built: install g++" in line
    assert "LONGROPE_KERNELS_BUILD=1" in line


def test_the_command_without_the_pipeline_extra_is_one_line():
    done = without_kernels("sys.modules['typer'] = None; from longrope.__main__ import main; main()")
    assert done.returncode == 2
    assert done.stderr.startswith("longrope: typer: got no such module, expected the pipeline extra: pip install")
    assert done.stderr.count("\n") == 1


def test_a_module_that_does_not_load_gives_the_loaders_reason(monkeypatch):
    def fail(name):
        raise ImportError("libm.so.6: version `GLIBC_2.99' not found")

    specification = importlib.util.spec_from_file_location("longrope_kernels.backends.cpu_again", cpu.__file__)
    again = importlib.util.module_from_spec(specification)
    monkeypatch.setattr(importlib, "import_module", fail)
    specification.loader.exec_module(again)
    assert again.unavailable_reason().startswith("the native module does not load (libm.so.6: version `GLIBC_2.99' not")
    assert again.levels() == []


@pytest.fixture
def source(tmp_path):
    """The files that a build begins with, and an empty PATH beside them."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(folder, name, text="exit 0"):
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def build(folder, mode, **environment):
    environment = {"PATH": str(folder / "bin"), "CXX": None, "LONGROPE_KERNELS_BUILD": mode} | environment
    return run(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out", cwd=folder, **environment)


FAILURES = {
    "no cmake": ((), {}, "cmake not found (pip install cmake)"),
    "no compiler": (("cmake",), {}, "no C++ compiler found (install g++)"),
    "no such compiler": (("cmake", "g++"), {"CXX": "icpx"}, "CXX: got 'icpx', expected a C++ compiler"),
    "the build fails": (("cmake", "g++"), {}, "building failed: CMake Error: no space left (all of it: "),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_build_that_cannot_be_is_an_error_in_mode_1_and_a_warning_in_auto(failure, source):
    programs, environment, line = FAILURES[failure]
    for name in programs:
        program(source, name, "echo 'CMake Error: no space left' >&2; exit 1")
    required = build(source, "1", **environment)
    assert required.returncode == 1
    assert required.stderr.startswith(f"longrope-kernels: {line}")
    assert required.stderr.count("\n") == 1
    stale = source / "out" / "longrope_kernels" / f"_cpu{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    stale.parent.mkdir(parents=True)
    stale.touch()
    for mode in (None, "auto"):
        optional = build(source, mode, **environment)
        assert optional.returncode == 0, optional.stderr
        assert optional.stderr.startswith(f"warning: longrope-kernels: {line}")
        assert "installing without native kernels: the fp64 reference backend runs, up to 100" in optional.stderr
        assert not stale.exists()


def test_mode_0_builds_nothing_and_says_nothing(source):
    done = build(source, "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (source / "out").exists()


@pytest.mark.parametrize("mode", ["2", "yes", ""])
def test_an_unknown_mode_is_one_line(mode, source):
    done = build(source, mode)
    assert done.returncode == 1
    assert done.stderr == f"LONGROPE_KERNELS_BUILD: got {mode!r}, expected auto, 0 or 1\n"


def test_an_unknown_mode_of_the_cuda_module_is_one_line(source):
    done = build(source, "auto", LONGROPE_KERNELS_CUDA="yes")
    assert done.returncode == 1
    assert done.stderr == "LONGROPE_KERNELS_CUDA: got 'yes', expected auto, 0 or 1\n"


# A cmake whose build of the CPU module is an empty file.
BUILDS_CPU = 'if [ "$1" = --build ]; then /bin/mkdir -p "$2/out" && : >"$2/out/_cpu.so"; fi'
NO_NVCC = {
    "none": ({}, "nvcc not found (it comes with the CUDA toolkit, 12 or newer)"),
    "no such compiler": ({"CUDACXX": "nvcc-99"}, "CUDACXX: got 'nvcc-99', expected nvcc"),
}


@pytest.mark.parametrize("failure", NO_NVCC)
def test_without_nvcc_the_cuda_kernels_are_left_out_or_insisted_on(failure, source):
    environment, line = NO_NVCC[failure]
    environment = {"CUDA_HOME": str(source / "no toolkit"), "CUDACXX": None} | environment
    program(source, "cmake", BUILDS_CPU)
    program(source, "g++")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    built, stale = (source / "out" / "longrope_kernels" / f"{name}{suffix}" for name in ("_cpu", "_cuda"))
    stale.parent.mkdir(parents=True)
    for mode in (None, "auto"):
        stale.touch()
        optional = build(source, "auto", LONGROPE_KERNELS_CUDA=mode, **environment)
        assert (optional.returncode, optional.stdout) == (0, "")
        assert optional.stderr == f"longrope-kernels: {line}; installing without CUDA kernels\n"
        assert built.exists()
        assert not stale.exists()
    required = build(source, "auto", LONGROPE_KERNELS_CUDA="1", **environment)
    assert required.returncode == 1
    assert required.stderr == f"longrope-kernels: {line}\n"
    without = build(source, "auto", LONGROPE_KERNELS_CUDA="0", **environment)
    assert (without.returncode, without.stdout, without.stderr) == (0, "", "")


@pytest.fixture
def archive(tmp_path):
    """A source distribution of this tree."""
    done = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    return path


def package_files():
    """Every file of both packages that people wrote: code, style sheets, tables, markers of types."""
    folders = ROOT / "longrope_kernels", ROOT / "python" / "longrope"
    files = (path for folder in folders for path in folder.rglob("*.*"))
    return [path for path in files if path.suffix not in (".pyc", ".so") and path.is_file()]


def test_a_wheel_has_every_file_of_the_packages(tmp_path):
    done = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, LONGROPE_KERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {str(path.relative_to(ROOT)).removeprefix("python/") for path in package_files()} <= built


def test_a_source_distribution_has_all_that_a_build_reads(archive):
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = [*ROOT.glob("csrc/**/*.*"), *package_files()]
    wanted += [ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_a_source_distribution_becomes_a_wheel_that_runs_outside_the_checkout(archive, tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    wheels = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, archive)
    built = run(*pip, *wheels, cwd=tmp_path, PATH=path, LONGROPE_KERNELS_BUILD="1")
    assert built.returncode == 0, built.stderr
    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    installed = run(*pip, "install", "--no-deps", "--target", site, *tmp_path.glob("*.whl"), cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    # torch and numpy are those of this environment; the package is the wheel's.
    (site / "torch.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("site-packages")))
    question = "import longrope_kernels as lk, torch; x = [torch.randn(1, 1, 4, 32)] * 3; print(lk.__file__, *"
    question += "lk.attention(*x, lk.RopeScaling(head_dim=32, theta=1e4), backend='cpu').shape)"
    answer = run(python, "-c", question, cwd=tmp_path, PYTHONPATH=None)
    assert answer.stdout == f"{site / 'longrope_kernels' / '__init__.py'} 1 1 4 32\n", answer.stderr
