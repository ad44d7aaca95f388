"""The emulated kernels as the cuda backend."""

import pytest

from longrope_kernels.backends import cuda

from . import build


@pytest.fixture(scope="session")
def emulator():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return build.module()


# Bytes of shared memory of a multiprocessor, by capability.
SHARED = {"sm_80": 164 << 10, "sm_86": 100 << 10, "sm_90": 228 << 10}


def run_as(emulator, capability):
    """The cuda backend runs emulated kernels on CPU tensors, as on a GPU of a capability."""
    before = cuda.emulate(emulator, hopper=capability == "sm_90")
    emulator.multiprocessor_shared(SHARED[capability])
    emulator.seed(0)
    yield emulator
    cuda.emulate(before)
    emulator.multiprocessor_shared(SHARED["sm_90"])  # as a module begins


@pytest.fixture
def emulated(emulator):
    """On an A100; the value is the emulator's module."""
    yield from run_as(emulator, "sm_80")


@pytest.fixture
def little_shared(emulator):
    """On sm_86 or sm_89, whose multiprocessors have the least shared memory."""
    yield from run_as(emulator, "sm_86")


@pytest.fixture
def hopper(emulator):
    """On a Hopper GPU: its own kernels where there are some."""
    yield from run_as(emulator, "sm_90")
