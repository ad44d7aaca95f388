"""The emulated kernels as the cuda backend."""

import pytest

from longrope_kernels.backends import cuda

from . import build


@pytest.fixture(scope="session")
def emulator():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return build.module()


@pytest.fixture
def emulated(emulator):
    """The cuda backend runs emulated kernels on CPU tensors; the value is the emulator's module."""
    before = cuda.emulate(emulator)
    emulator.seed(0)
    yield emulator
    cuda.emulate(before)


@pytest.fixture
def hopper(emulator):
    """The same on a Hopper GPU: its own kernels where there are some."""
    before = cuda.emulate(emulator, hopper=True)
    emulator.seed(0)
    yield emulator
    cuda.emulate(before)
