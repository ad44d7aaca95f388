"""The instruction set of the CPU kernels, for tests that `levels` marks; the order of files; a faster interpreter."""

import importlib.util
import os

import pytest

from longrope_kernels.backends import cpu

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from bench import interpreter

    interpreter.patch_once()

# `make test` deals files out to processes: the longest first, so that none is left alone with one at the end.
LONGEST = (
    "test_triton.py",
    "test_progressive.py",
    "test_progressive_ranks.py",
    "test_hopper_backward.py",
    "test_bench_gpu.py",
    "test_triton_compile.py",
    "test_conformance.py",
    "test_team.py",
    "test_cuda_build.py",
    "test_large.py",
    "test_cache.py",
    "test_kernels.py",
    "test_evaluate_measure.py",
    "test_tune_ranks.py",
    "test_processes.py",
)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def cpu_level(request, monkeypatch):
    """Set the level that the test's parameters ask for, and assert that kernels of no other served it."""
    asked = getattr(request, "param", None)
    if asked is None:
        yield None
        return
    monkeypatch.setenv("LONGROPE_KERNELS_CPU_LEVEL", asked)
    before = cpu.calls()
    yield asked
    served = [level for level, count in cpu.calls().items() if count > before[level]]
    assert served == [asked], f"asked for {asked}, served by {served}"
