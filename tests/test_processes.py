"""Kernels where a process forks, or where its memory ends: no hang, no abort, and the same bits afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import longrope_kernels
from longrope_kernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.levels(), reason="the native module is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="fork, and limits of address space"),
]

SECONDS = 120  # until a child that waits for threads it does not have counts as hung; a run takes about five

PRELUDE = """
import os, sys, torch
torch.set_num_threads(2)

def results():  # of sizes at which torch itself starts no threads: in a child of a fork it would hang
    import longrope_kernels as lk
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, heads, 120, 64, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    scaling = lk.RopeScaling(head_dim=64, theta=1e4)
    out = lk.attention(*leaves, scaling, backend="cpu")
    rotated = lk.apply_rope(*leaves[:2], scaling, backend="cpu")
    return [out, *rotated, *torch.autograd.grad(out.square().sum(), leaves)]

def forked(work):
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

def compare(expected):
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
"""

AFTER_USE = """
expected = results()
forked(lambda: compare(expected))
forked(lambda: forked(lambda: compare(expected)))
compare(expected)
"""

FIRST_IN_THE_CHILD = """
torch.randn(4_000_000).exp().sum()  # starts the threads of torch's pool, which the child does not have
assert "longrope_kernels" not in sys.modules
expected = []
forked(results)
compare(results())
"""

# The limit is a little above what is mapped. Work of a whole worker, which holds a block of rows of every query head of
# the group, does not fit; small tensors do.
OUT_OF_MEMORY = """
import resource
import longrope_kernels as lk
from longrope_kernels.backends import cpu

torch.set_num_threads(int(sys.argv[1]))
expected = results()
query, key = torch.randn(1, 2048, 8, 64), torch.randn(1, 1, 8, 64)
scaling = lk.RopeScaling(head_dim=64, theta=1e4)
out, lse = lk.attention(query, key, key, scaling, is_causal=False, return_lse=True)
bundles = lk.functional.bundle(query, key, key, scaling, is_causal=False)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (mapped + (100 << 20), unlimited[1]))
try:
    cpu.attention_backward(out, None, query, key, key, out, lse, *bundles, False)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    compare(expected)
    print("raised", end="")
"""


def run(program, *arguments, prelude=PRELUDE):
    """Standard output of a program in a process group of its own, which does not outlive the time it has."""
    with subprocess.Popen(
        [sys.executable, "-c", prelude + program, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(longrope_kernels.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail(f"still running after {SECONDS} s")
    assert process.returncode == 0, f"exit status {process.returncode}: {errors[-500:]}"
    return out


def test_a_child_of_a_process_that_used_the_kernels_gets_the_same_bits():
    run(AFTER_USE)


def test_a_child_that_is_the_first_to_import_the_kernels_gets_results():
    run(FIRST_IN_THE_CHILD)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_ends_in_a_worker_raises_and_the_process_goes_on(threads):
    assert run(OUT_OF_MEMORY, str(threads)) == "raised"


def test_a_hang_and_an_abort_are_seen(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    with pytest.raises(pytest.fail.Exception, match="still running"):
        run("import time; time.sleep(100)", prelude="")
    with pytest.raises(AssertionError, match="exit status -6"):
        run("import os; os.abort()", prelude="")
