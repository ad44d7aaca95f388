"""The CUDA sources compiled for the host over csrc/emulator, as modules of their own; objects are cached by content."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    """Return the C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def kernels() -> list[Path]:
    """Return every CUDA source."""
    return sorted((CSRC / "cuda").rglob("*.cu"))


def module(changes: dict[str, str] | None = None) -> ModuleType:
    """Build and load the kernels as `_emulator`.

    Args:
        changes: text of sources under csrc, by path, that stands in for the file's own: a planted bug.
    """
    sources = [*kernels(), CSRC / "bindings" / "cuda_module.cpp", *sorted((CSRC / "emulator").glob("*.cpp"))]
    return _load("_emulator", sources, changes or {})


def misuse(of: str = "") -> ModuleType:
    """Build and load the kernels of misuse.cu, or misuse_`of`.cu, each with one mistake."""
    name = f"misuse_{of}" if of else "misuse"
    here = Path(__file__).resolve().parent / f"{name}.cu"
    return _load(f"_{name}", [here, *sorted((CSRC / "emulator").glob("*.cpp"))], {})


def _load(name: str, sources: list[Path], changes: dict[str, str]) -> ModuleType:
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = CSRC
    if changes:
        whole = hashlib.sha256(repr(sorted(changes.items())).encode())
        for path in sorted(x for x in CSRC.rglob("*") if x.is_file()):
            whole.update(str(path).encode() + path.read_bytes())
        tree = CACHE / "changed" / whole.hexdigest()[:16]
        if not tree.exists():
            part = tree.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(CSRC, part)
            for changed, text in changes.items():
                (part / changed).write_text(text)
            part.rename(tree)
        sources = [tree / x.relative_to(CSRC) if x.is_relative_to(CSRC) else x for x in sources]
    flags = [*FLAGS, f"-I{sysconfig.get_paths()['include']}", f"-I{_pybind11()}"]
    common = hashlib.sha256(" ".join([compiler() or "", *flags, sys.version]).encode())

    def compiled(source: Path) -> Path:
        # For what needs it alone: all modules share the emulator's own objects.
        named = [f"-DLONGROPE_MODULE={name}"] if "LONGROPE_MODULE" in source.read_text() else []
        digest = common.copy()
        digest.update(" ".join(named).encode())
        for path in _with_headers(source):
            digest.update(path.read_bytes())
        target = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}.o"
        if not target.exists():
            _run([str(compiler()), *flags, *named, "-x", "c++", "-c", str(source), "-o", f"{target}.part"])
            os.replace(f"{target}.part", target)
        return target

    # One process at a time: the next finds done what it would have done again.
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compiled, sources))
        digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
        library = CACHE / f"{name}-{digest}.so"
        if not library.exists():
            _run([str(compiler()), "-shared", *map(str, objects), "-o", f"{library}.part"])
            os.replace(f"{library}.part", library)
    # pybind11 keeps modules by their full name, of which the last part names the entry point.
    spec = importlib.util.spec_from_file_location(f"build_{digest}.{name}", library)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _with_headers(source: Path) -> list[Path]:
    """Return a source and what it includes of ours, and what that does."""
    found = [source]
    for path in found:
        for name in re.findall(r'^ *#include "(.+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            if header not in found:
                found.append(header)
    return found


def _pybind11() -> str:
    import pybind11

    return pybind11.get_include()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
