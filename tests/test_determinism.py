"""The same call gives the same bits, and so does a sequence whatever shares its batch: lse and gradients included."""

import pytest
import torch
from levels import every_level

import longrope_kernels as lk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = lk.RopeScaling(head_dim=32, theta=1e4)
LONG = PLAIN.replace(rescale_factors=[1.0 + i / 8 for i in range(16)], start_tokens=5, attention_factor=1.1)
LADDER = lk.LongRope(200, {200: PLAIN, 4000: LONG})
LENGTHS = torch.tensor([330, 0, 150, 257])
STARTS = torch.tensor([3, 10, 180, 0])


def batch(query_tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, query_tokens), (2, 333), (2, 333)]
    return [torch.randn(len(LENGTHS), *shape, 32, generator=generator).to(dtype) for shape in shapes]


def results(operands, attention=lk.attention, sequences=slice(None)):
    """Out, lse and the gradients of both, of some sequences of a batch."""
    leaves = [x[sequences].clone().requires_grad_() for x in operands]
    where = {"key_start": STARTS[sequences], "key_length": LENGTHS[sequences], "window": 200}
    out, lse = attention(*leaves, LADDER, return_lse=True, **where)
    seen = torch.where(lse.isinf(), 0.0, lse)  # a row that sees no key
    return out, lse, *torch.autograd.grad((out * out.detach().cos()).sum() + seen.sin().sum(), leaves)


NAMES = ("out", "lse", "d query", "d key", "d value")


def assert_repeats(operands, attention=lk.attention):
    first, *others = (results(operands, attention) for _ in range(3))
    for other in others:
        for name, a, b in zip(NAMES, first, other, strict=True):
            assert torch.equal(a, b), f"{name} differs from run to run"


def assert_alone_as_together(operands, attention=lk.attention):
    together = results(operands, attention)
    for b in range(len(LENGTHS)):
        alone = results(operands, attention, slice(b, b + 1))
        for name, a, c in zip(NAMES, alone, together, strict=True):
            assert torch.equal(a[0], c[b]), f"{name} of sequence {b} depends on its neighbours"


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_tokens", [1, 300])
def test_gradients_and_lse_repeat_bit_for_bit(query_tokens, dtype):
    assert_repeats(batch(query_tokens, dtype))


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_tokens", [1, 300])
def test_neighbours_change_no_bit_of_gradients_and_lse(query_tokens, dtype):
    assert_alone_as_together(batch(query_tokens, dtype))


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_change_no_sum_over_parts_of_the_queries(dtype):
    """Alone a long sequence is cut in parts for many threads; beside seven others there would be work without that."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 600), (4, 600), (4, 600)]
    operands = [torch.randn(8, *shape, 32, generator=generator).to(dtype) for shape in shapes]

    def gradients(sequences):
        leaves = [x[sequences].clone().requires_grad_() for x in operands]
        out = lk.attention(*leaves, PLAIN)
        return torch.autograd.grad((out * out.detach().cos()).sum(), leaves)

    alone, together = gradients(slice(3, 4)), gradients(slice(None))
    for name, a, b in zip(NAMES[2:], alone, together, strict=True):
        assert torch.equal(a[0], b[3]), f"{name} depends on the sequence's neighbours"


class Stray(torch.autograd.Function):
    """Passes on what it gets, lse or the gradient of the key scaled by 1 + eps times a number of `draw`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize("part", ["lse", "d key"])
def test_both_see_one_unit_in_the_last_place(part):
    calls = []

    def off(operands, **_):
        calls.append(operands)
        return 1 + 2**-22 * (len(calls) + operands.shape[0] - 1)

    def attention(query, key, value, scaling, **kwargs):
        factor = off(query)
        if part == "d key":
            key = Stray.apply(key, factor)
        out, lse = lk.attention(query, key, value, scaling, **kwargs)
        return out, lse * factor if part == "lse" else lse

    for check in (assert_repeats, assert_alone_as_together):
        with pytest.raises(AssertionError, match=part):
            check(batch(300, torch.float32), attention)
