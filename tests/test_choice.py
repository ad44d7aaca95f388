"""The choice between Triton's kernels and the CUDA ones is a function of the problem and of what was measured."""

import functools
import itertools
import types

import pytest
import torch

from longrope_kernels import backends
from longrope_kernels.backends import choice

TABLE = {("attention", (9, 0)): choice.Faster((64, 128), 1024)}
HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("op", "architecture", "head_dim", "dtype", "tokens", "wanted"),
    [
        ("attention", HOPPER, 64, torch.float16, 1024, "cuda"),
        ("attention", HOPPER, 128, torch.bfloat16, 1 << 20, "cuda"),
        ("attention", HOPPER, 96, torch.bfloat16, 4096, "cuda"),
        ("attention", HOPPER, 128, torch.bfloat16, 1023, "triton"),
        ("attention", HOPPER, 256, torch.bfloat16, 4096, "triton"),
        ("attention", HOPPER, 128, torch.float32, 4096, "triton"),
        ("attention", (8, 0), 128, torch.bfloat16, 4096, "triton"),
        ("attention_backward", HOPPER, 128, torch.bfloat16, 4096, "triton"),
    ],
)
def test_cuda_is_chosen_within_what_was_measured(op, architecture, head_dim, dtype, tokens, wanted):
    assert choice.choose_backend(op, architecture, head_dim, dtype, tokens, TABLE) == wanted


def test_without_a_measurement_triton_comes_first():
    problems = itertools.product(
        ("attention", "attention_backward", "apply_rope"), ((8, 0), HOPPER), (64, 128), (1, 1 << 20)
    )
    for op, architecture, head_dim, tokens in problems:
        chosen = choice.choose_backend(op, architecture, head_dim, torch.bfloat16, tokens, {})
        assert chosen == "triton"


@pytest.mark.parametrize(("tokens", "first"), [(4096, "cuda"), (64, "triton")])
def test_the_chosen_backend_is_tried_first_and_the_others_after_it(monkeypatch, tokens, first):
    query = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 8, tokens, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(backends, "choose_backend", functools.partial(choice.choose_backend, measured=TABLE))
    assert backends.preference("attention", query)[0] == first
    assert sorted(backends.preference("attention", query)) == ["cuda", "reference", "triton"]


def test_every_line_of_the_table_is_an_op_and_a_capability():
    for (op, architecture), faster in choice.MEASURED.items():
        assert op in ("apply_rope", "attention", "attention_backward", "attention_varlen", "attention_paged")
        assert len(architecture) == 2
        assert faster.head_dims
