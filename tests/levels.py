"""Marks that run a test at every instruction set of this machine; `conftest.cpu_level` sets it, asserts that it ran."""

import pytest

from longrope_kernels.backends import cpu

# At or below a cap in the environment, best first; [None] where the native module is not built.
LEVELS = cpu.levels()[cpu.levels().index(cpu.level()) :] if cpu.levels() else [None]

every_level = pytest.mark.parametrize("cpu_level", LEVELS, indirect=True)
every_backend_and_level = pytest.mark.parametrize(
    ("backend", "cpu_level"),
    [("reference", None), *(("cpu", level) for level in LEVELS if level)],
    indirect=["cpu_level"],
)
