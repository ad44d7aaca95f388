"""`make sanitize` sees what it is for: a kernel that reads what is not its own dies with a report.

Nothing is planted in the sources. The native functions take addresses and sizes, so a buffer that is one token shorter
than its operand says makes a kernel read out of bounds. Each call has a process of its own, which must not survive.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from levels import LEVELS

from longrope_kernels.backends import cpu

# By what was asked for, not by what the module says: an uninstrumented one must fail here.
pytestmark = pytest.mark.skipif(os.environ.get("LONGROPE_KERNELS_SANITIZE") != "1", reason="run by `make sanitize`")

OPERATIONS = ("apply_rope", "attention", "attention_backward", "attention_paged", "cache_append")
PROGRAM = """
import sys
import torch
import longrope_kernels as lk
from longrope_kernels.backends import cpu, native

assert cpu._native.SANITIZED
scaling = lk.RopeScaling(head_dim=64, theta=1e4)
query, key, value = (torch.randn(1, heads, 70, 64) for heads in (4, 2, 2))
cache = lk.KVCache(1, 2, 64, 70, torch.float32)
cache.append(key, value)
out, lse = cpu.attention(query, key, value, *(bundles := lk.functional.bundle(query, key, value, scaling)))
operations = {
    "apply_rope": (query, lambda: lk.apply_rope(query, key, scaling)),
    "attention": (key, lambda: lk.attention(query, key, value, scaling)),
    "attention_backward": (
        value,
        lambda: cpu.attention_backward(out, None, query, key, value, out, lse, *bundles, False),
    ),
    "attention_paged": (cache.pages.value, lambda: cache.attend(query[:, :, -1:], scaling)),
    "cache_append": (key, lambda: lk.KVCache(1, 2, 64, 70, torch.float32).append(key, value)),
}
whole, run = operations[sys.argv[1]]
given = native.operand
shorter, shift = int(sys.argv[2]), int(sys.argv[3])
buffer = torch.zeros(whole.numel() - shorter)
native.operand = lambda x: (
    (buffer.data_ptr() + shift, *given(x)[1:]) if x.data_ptr() == whole.data_ptr() else given(x)
)
run()
print("survived")
"""


def run(operation, shorter, shift=0, level=LEVELS[0]):
    """Run `operation` on an operand whose buffer is `shorter` by so many elements and begins `shift` bytes late."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, operation, str(shorter), str(shift)],
        cwd=Path(cpu.__file__).parents[2],  # that of the sanitized copy: `-c` puts the current folder first
        env=os.environ | {"LONGROPE_KERNELS_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("operation", "level"),
    [("attention", level) for level in LEVELS] + [(name, LEVELS[0]) for name in OPERATIONS if name != "attention"],
)
def test_a_read_past_the_end_is_caught(operation, level):
    done = run(operation, shorter=64, level=level)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "READ of size" in done.stderr
    assert "csrc/cpu/" in done.stderr


def test_a_misaligned_read_is_caught():
    done = run("apply_rope", shorter=0, shift=2)
    assert done.returncode != 0
    assert "runtime error: load of misaligned address" in done.stderr


@pytest.mark.parametrize(
    "operation", ["apply_rope", "attention", "attention_backward", "attention_paged", "cache_append"]
)
def test_the_same_call_on_whole_buffers_survives(operation):
    assert run(operation, shorter=0).stdout == "survived\n"
