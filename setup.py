"""Build the native modules with CMake; without a compiler, install the Python packages alone and say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
SANITIZE = os.environ.get("LONGROPE_KERNELS_SANITIZE") == "1"


def mode_of(variable: str) -> str:
    """Return auto (the default), 0 (leave the module out) or 1 (fail without it)."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: got {mode!r}, expected auto, 0 or 1")
    return mode


MODE = mode_of("LONGROPE_KERNELS_BUILD")
# Without the CPU kernels none for CUDA either; sanitizers are for the CPU's.
CUDA_MODE = "0" if MODE == "0" or SANITIZE else mode_of("LONGROPE_KERNELS_CUDA")


class BuildFailed(Exception):
    """Why a native module could not be built, in one line."""


class CMakeBuild(build_ext):
    """Builds `longrope_kernels._cpu` and, where nvcc is found, `longrope_kernels._cuda`."""

    def run(self) -> None:
        if MODE == "0":
            return
        try:
            self.cmake("_cpu")
        except BuildFailed as failure:
            if MODE == "1":
                raise SystemExit(f"longrope-kernels: {failure}") from None
            print(
                f"warning: longrope-kernels: {failure}; installing without native kernels: the fp64 reference backend "
                "runs, up to 100 times slower (LONGROPE_KERNELS_BUILD=1 fails instead)",
                file=sys.stderr,
            )
            self.leave_out("_cpu", "_cuda")
            return
        try:
            if CUDA_MODE == "0":
                self.leave_out("_cuda")
            else:
                self.cmake("_cuda")
        except BuildFailed as failure:
            if CUDA_MODE == "1":
                raise SystemExit(f"longrope-kernels: {failure}") from None
            print(f"longrope-kernels: {failure}; installing without CUDA kernels", file=sys.stderr)
            self.leave_out("_cuda")

    def leave_out(self, *names: str) -> None:
        """Do without a module; that of an earlier build does not belong to these sources."""
        for name in names:
            Path(self.get_ext_fullpath(f"longrope_kernels.{name}")).unlink(missing_ok=True)
        self.extensions = [x for x in self.extensions if x.name.rpartition(".")[2] not in names]

    def cmake(self, name: str) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise BuildFailed("cmake not found (pip install cmake)")
        wanted = os.environ.get("CXX")
        compiler = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise BuildFailed(
                f"CXX: got {wanted!r}, expected a C++ compiler" if wanted else "no C++ compiler found (install g++)"
            )
        try:
            import pybind11
        except ImportError:
            raise BuildFailed("pybind11 not found (pip install pybind11)") from None

        options = []
        if name == "_cuda":
            wanted = os.environ.get("CUDACXX")
            toolkit = os.path.join(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
            nvcc = shutil.which(wanted) if wanted else shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)
            if nvcc is None:
                missing = "nvcc not found (it comes with the CUDA toolkit, 12 or newer)"
                raise BuildFailed(f"CUDACXX: got {wanted!r}, expected nvcc" if wanted else missing)
            options = ["-DLONGROPE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        target = Path(self.get_ext_fullpath(f"longrope_kernels.{name}")).resolve()
        ninja = shutil.which("ninja")
        # A folder for each answer that a CMake cache cannot change later.
        kind = ("ninja" if ninja else "make", *(["sanitize"] if SANITIZE else []), *(["cuda"] if options else []))
        build = ROOT / "build" / "-".join(("cmake", str(sys.implementation.cache_tag), *kind))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DLONGROPE_SANITIZE={'ON' if SANITIZE else 'OFF'}",
            *options,
        ]
        if ninja:  # said anew each time: that of an isolated build is gone with its environment
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                log = build / "failure.log"
                log.write_text(result.stdout + result.stderr)
                errors = [line for line in (result.stdout + result.stderr).splitlines() if "rror" in line]
                first = errors[0].strip() if errors else "no message"
                raise BuildFailed(f"building failed: {first} (all of it: {log})")
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next((build / "out").glob(f"{name}*"))
        part = target.with_name(f".{target.name}.part")
        shutil.copy2(built, part)
        os.replace(part, target)  # a process that runs the old module keeps it


packages = find_packages(include=["longrope_kernels", "longrope_kernels.*"])
packages += find_packages(where="python", include=["longrope", "longrope.*"])

setup(
    packages=packages,
    package_data={
        "longrope_kernels": ["py.typed", "backends/triton/configs.json"],
        "longrope": ["py.typed", "report/*.css", "evaluate/lm_eval_tasks/*"],
    },
    ext_modules=[Extension(f"longrope_kernels.{name}", sources=[]) for name in ("_cpu", "_cuda") if MODE != "0"],
    cmdclass={"build_ext": CMakeBuild},
)
