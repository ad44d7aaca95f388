"""The choice between Triton's kernels and the CUDA ones is a function of the problem and of what was measured."""

import functools
import itertools
import types
import warnings

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import backends
from longrope_kernels.backends import choice

TABLE = {
    ("attention", (9, 0)): choice.Faster((64, 128), 1024),
    ("apply_rope", (9, 0)): choice.Faster((64, 128), 1),
    ("attention_paged", (9, 0)): choice.Faster((64, 128), 1, 8192),
}
HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("op", "architecture", "head_dim", "dtype", "tokens", "keys", "wanted"),
    [
        ("attention", HOPPER, 64, torch.float16, 1024, 1024, "cuda"),
        ("attention", HOPPER, 128, torch.bfloat16, 1 << 20, 1 << 20, "cuda"),
        ("attention", HOPPER, 96, torch.bfloat16, 4096, 4096, "cuda"),
        ("attention", HOPPER, 128, torch.bfloat16, 1023, 1023, "triton"),
        ("attention", HOPPER, 256, torch.bfloat16, 4096, 4096, "triton"),
        ("attention", HOPPER, 128, torch.float32, 4096, 4096, "triton"),
        ("attention", (8, 0), 128, torch.bfloat16, 4096, 4096, "triton"),
        ("attention_backward", HOPPER, 128, torch.bfloat16, 4096, 4096, "triton"),
        ("apply_rope_in_place", HOPPER, 128, torch.bfloat16, 4096, 4096, "cuda"),
        ("attention_paged", HOPPER, 128, torch.bfloat16, 1, 8192, "cuda"),
        ("attention_paged", HOPPER, 128, torch.bfloat16, 1, 8191, "triton"),
    ],
)
def test_cuda_is_chosen_within_what_was_measured(op, architecture, head_dim, dtype, tokens, keys, wanted):
    assert choice.choose_backend(op, architecture, head_dim, dtype, tokens, keys, TABLE) == wanted


def test_without_a_measurement_triton_comes_first():
    problems = itertools.product(
        ("attention", "attention_backward", "apply_rope"), ((8, 0), HOPPER), (64, 128), (1, 1 << 20)
    )
    for op, architecture, head_dim, tokens in problems:
        chosen = choice.choose_backend(op, architecture, head_dim, torch.bfloat16, tokens, tokens, {})
        assert chosen == "triton"


def on_hopper(monkeypatch, shape):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    return types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=shape)


@pytest.mark.parametrize(("tokens", "first"), [(4096, "cuda"), (64, "triton")])
def test_the_chosen_backend_is_tried_first_and_the_others_after_it(monkeypatch, tokens, first):
    query = on_hopper(monkeypatch, (1, 8, tokens, 128))
    monkeypatch.setattr(backends, "choose_backend", functools.partial(choice.choose_backend, measured=TABLE))
    assert backends.preference("attention", query, tokens)[0] == first
    assert sorted(backends.preference("attention", query, tokens)) == ["cuda", "reference", "triton"]


def test_every_line_of_the_table_is_an_op_and_a_capability():
    for (op, architecture), faster in choice.MEASURED.items():
        assert op in ("apply_rope", "attention", "attention_backward", "attention_varlen", "attention_paged")
        assert len(architecture) == 2
        assert faster.head_dims


@pytest.fixture
def printed(monkeypatch, capsys):
    """What was printed of choices since the last call."""
    monkeypatch.setenv("LONGROPE_KERNELS_DEBUG", "1")
    backends._print_once.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


def test_each_choice_is_printed_once_with_all_that_it_is_made_from(printed):
    q, k = torch.randn(1, 2, 3, 32), torch.randn(1, 1, 5, 32)
    line = "longrope_kernels: attention on cpu, torch.float32, head_dim 32, {} query tokens, {} key tokens -> {}"
    for _ in range(2):
        lk.attention(q, k, k, backend="reference")
    assert printed() == [line.format(3, 5, "reference, forced")]
    lk.attention(q[:, :, :2], k, k, backend="reference")
    lk.attention(q[:, :, :2], k[:, :, :4], k[:, :, :4], backend="reference")
    assert printed() == [line.format(2, n, "reference, forced") for n in (5, 4)]
    chosen = next(name for name in backends.PREFERENCE["cpu"] if backends.unavailable_reason(name) is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference, where nothing else is built
        lk.attention(q, k, k)
    assert printed() == [line.format(3, 5, chosen)]


@pytest.mark.parametrize(("tokens", "chosen"), [(4096, "cuda"), (64, "triton")])
def test_on_a_gpu_the_architecture_is_printed(monkeypatch, printed, tokens, chosen):
    query = on_hopper(monkeypatch, (1, 8, tokens, 128))
    monkeypatch.setattr(backends, "choose_backend", functools.partial(choice.choose_backend, measured=TABLE))
    monkeypatch.setattr(backends, "_refusal", lambda *arguments: None)
    backends.pick("attention", query, 9000, None)
    backends.pick("attention_paged", query, 9000, "triton", torch.int8)
    problem = f"torch.bfloat16, head_dim 128, {tokens} query tokens, 9000 key tokens"
    assert printed() == [
        f"longrope_kernels: attention on sm_90, {problem} -> {chosen}",
        f"longrope_kernels: attention_paged on sm_90, {problem} -> triton, forced",
    ]


def test_packed_operands_have_their_tokens_first(printed):
    q = torch.randn(7, 2, 32)
    lk.attention_varlen(q, q, q, torch.tensor([0, 3, 7]), backend="reference")
    assert [line.split(": ")[1].split(",")[3] for line in printed()] == [" 7 query tokens"]


def test_of_a_cache_the_capacity_is_printed(printed):
    cache = lk.KVCache(batch=1, key_heads=1, head_dim=32, max_tokens=100, dtype=torch.float32)
    x = torch.randn(1, 1, 2, 32)
    cache.append(x, x, backend="reference")
    cache.attend(x, backend="reference")
    lines = printed()
    assert [line.split(": ")[1].split(" on ")[0] for line in lines] == ["cache_append", "attention_paged"]
    assert all("2 query tokens, 100 key tokens -> reference, forced" in line for line in lines)


def test_nothing_is_printed_unasked(monkeypatch, printed):
    monkeypatch.delenv("LONGROPE_KERNELS_DEBUG")
    q = torch.randn(1, 1, 2, 32)
    lk.attention(q, q, q, backend="reference")
    assert printed() == []
