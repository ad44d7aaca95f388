"""Build the native module with CMake; without a compiler, install the Python packages alone and say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildFailed(Exception):
    """Why the native module could not be built, in one line."""


class CMakeBuild(build_ext):
    """Builds `longrope_kernels._cpu`. LONGROPE_KERNELS_BUILD: auto (default), 1 (fail without it), 0 (leave it out)."""

    def run(self) -> None:
        mode = os.environ.get("LONGROPE_KERNELS_BUILD", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"LONGROPE_KERNELS_BUILD: got {mode!r}, expected auto, 0 or 1")
        if mode == "0":
            self.extensions = []
            return
        try:
            for extension in self.extensions:
                self.cmake(extension)
        except BuildFailed as failure:
            if mode == "1":
                raise SystemExit(f"longrope-kernels: {failure}") from None
            print(
                f"warning: longrope-kernels: {failure}; installing without native kernels, the reference backend "
                "works and is up to 100 times slower",
                file=sys.stderr,
            )
            self.extensions = []

    def cmake(self, extension: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise BuildFailed("cmake not found (pip install cmake)")
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None or shutil.which(compiler) is None:
            raise BuildFailed(f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}; install g++ 12 or clang 15)")
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
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
            f"-DLONGROPE_SANITIZE={'ON' if os.environ.get('LONGROPE_KERNELS_SANITIZE') == '1' else 'OFF'}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for command in (configure, [cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                log = build / "failure.log"
                log.write_text(result.stdout + result.stderr)
                errors = [line for line in (result.stdout + result.stderr).splitlines() if "rror" in line]
                first = errors[0].strip() if errors else "no message"
                raise BuildFailed(f"building failed: {first} (all of it: {log})")
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next((build / "out").glob("_cpu*"))
        part = target.with_name(f".{target.name}.part")
        shutil.copy2(built, part)
        os.replace(part, target)  # a process that runs the old module keeps it


packages = find_packages(include=["longrope_kernels", "longrope_kernels.*"])
packages += find_packages(where="python", include=["longrope", "longrope.*"])

setup(
    packages=packages,
    package_data={"longrope_kernels": ["py.typed"], "longrope": ["py.typed"]},
    ext_modules=[Extension("longrope_kernels._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
