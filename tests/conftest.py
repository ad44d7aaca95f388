"""The instruction set of the CPU kernels, for the tests that `levels` marks."""

import pytest

from longrope_kernels.backends import cpu


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
