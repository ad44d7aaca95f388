"""Packed batches: every sequence is what it is alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import every_backend_and_level, every_level

import longrope_kernels as lk
from longrope_kernels import testing

PLAIN = lk.RopeScaling(head_dim=64, theta=1e4)
LONG = PLAIN.replace(rescale_factors=[1.0 + i / 8 for i in range(32)], start_tokens=5, attention_factor=1.1)
LADDER = lk.LongRope(40, {40: PLAIN, 400: LONG})
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed(query_lengths, key_lengths, dtype=torch.float32, heads=(4, 2), head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(query_lengths), heads[0]), *[(sum(key_lengths), heads[1])] * 2]
    operands = [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    return operands, bounds


def alone(operands, bounds, b):
    """Sequence b as a batch of one."""
    return [
        x[ends[b] : ends[b + 1]].transpose(0, 1).unsqueeze(0)
        for x, ends in zip(operands, (bounds[0], bounds[1], bounds[1]), strict=True)
    ]


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 60)), min_size=1, max_size=5), st.booleans())
def test_a_packed_sequence_gives_the_bits_it_gives_alone(dtype, lengths, is_causal):
    query_lengths, key_lengths = [n for n, _ in lengths], [n + more for n, more in lengths]
    operands, bounds = packed(query_lengths, key_lengths, dtype)
    options = {"is_causal": is_causal, "window": 70, "softcap": 20.0}
    out, lse = lk.attention_varlen(*operands, *bounds, LADDER, return_lse=True, **options)
    for b in range(len(lengths)):
        rows = slice(int(bounds[0][b]), int(bounds[0][b + 1]))
        one, one_lse = lk.attention(*alone(operands, bounds, b), LADDER, return_lse=True, **options)
        assert torch.equal(out[rows], one[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], one_lse[0])


@every_level
def test_bounds_may_have_any_stride():
    operands, (bounds, _) = packed([10, 15, 15], [10, 15, 15])
    strided = torch.stack([bounds, bounds * 0 + 7], 1)[:, 0]
    assert torch.equal(lk.attention_varlen(*operands, bounds, scaling=LADDER),
                       lk.attention_varlen(*operands, strided, scaling=LADDER))  # fmt: skip


@every_backend_and_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_sequences_alone(backend, dtype):
    operands, bounds = packed([3, 60, 0, 20], [30, 60, 4, 20], dtype)
    packed_leaves = [x.clone().requires_grad_() for x in operands]
    leaves = [x.clone().requires_grad_() for x in operands]
    out, lse = lk.attention_varlen(*packed_leaves, *bounds, LONG, return_lse=True, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad((out * weight).sum() + lse.sin().sum(), packed_leaves)
    loss = 0.0
    for b in range(4):
        rows = slice(int(bounds[0][b]), int(bounds[0][b + 1]))
        one, one_lse = lk.attention(*alone(leaves, bounds, b), LONG, return_lse=True, backend=backend)
        loss = loss + (one[0].transpose(0, 1) * weight[rows]).sum() + one_lse.sin().sum()
    for grad, expected in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(grad, expected)


def test_the_factors_gradient_adds_up_over_the_sequences():
    operands, bounds = packed([30, 50], [30, 50], torch.float64)
    factors = torch.linspace(1, 3, 32, dtype=torch.float64, requires_grad=True)
    scaling = PLAIN.replace(rescale_factors=factors)
    out = lk.attention_varlen(*operands, *bounds, scaling)
    (grad,) = torch.autograd.grad(out.square().sum(), factors)
    total = sum(
        torch.autograd.grad(lk.attention(*alone(operands, bounds, b), scaling).square().sum(), factors)[0]
        for b in range(2)
    )
    assert torch.allclose(grad, total, rtol=1e-10)


@every_level
def test_explicit_positions_choose_the_regime_and_the_angles():
    operands, bounds = packed([20, 30], [20, 30])
    at = torch.cat((torch.arange(20), torch.arange(30) + 100))
    out = lk.attention_varlen(*operands, *bounds, LADDER, query_positions=at, key_positions=at)
    for b, scaling in enumerate((PLAIN, LONG)):
        rows = slice(int(bounds[0][b]), int(bounds[0][b + 1]))
        where = {"query_positions": at[rows], "key_positions": at[rows]}
        one = lk.attention(*alone(operands, bounds, b), scaling, **where)
        assert torch.equal(out[rows], one[0].transpose(0, 1))


@every_level
def test_transposed_operands_need_no_copy():
    operands, bounds = packed([20, 30], [20, 30])
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands]
    assert torch.equal(lk.attention_varlen(*turned, *bounds, LONG), lk.attention_varlen(*operands, *bounds, LONG))


def test_the_op_is_sound_and_compiles():
    operands, bounds = packed([8, 12], [8, 12], heads=(2, 1))
    rotation = LONG.rotation(torch.zeros(2, dtype=torch.int32))
    tables = [rotation.turns, rotation.base_turns, rotation.inv_freq, rotation.start_tokens]
    tables += [rotation.attention_factor, rotation.regime_index]
    leaves = [x.clone().requires_grad_() for x in operands]
    numbers = (None, None, 0.125, True, -1, -1, 0.0, False, "")
    torch.library.opcheck(torch.ops.longrope_kernels.attention_varlen, (*leaves, *tables, *bounds, *numbers))

    def layer(q, k, v, bounds):
        return lk.attention_varlen(q, k, v, bounds, scaling=LONG)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*operands, bounds[0]), layer(*operands, bounds[0]))


@every_level
def test_obeys_the_error_rule_against_float64():
    operands, bounds = packed([100, 7, 200], [120, 300, 200], torch.bfloat16)
    out = lk.attention_varlen(*operands, *bounds, LONG)
    for b in range(3):
        problem = testing.Problem(*alone(operands, bounds, b), LONG, {})
        exact = lk.reference.attention(*problem.operands, LONG)
        plain, _ = testing.plain_attention(problem)
        rows = slice(int(bounds[0][b]), int(bounds[0][b + 1]))
        testing.assert_within_error_rule("out", out[rows].transpose(0, 1).unsqueeze(0), plain, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens_q": torch.tensor([0, 10, 30])},
            r"cu_seqlens_q: got 0 ... 30, expected .* the 40 tokens",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 50, 40])}, r"cu_seqlens_q: got 40 after 50 at 2"),
        ({"cu_seqlens_q": torch.tensor([5, 10, 40])}, r"cu_seqlens_q: got 5 ... 40, expected 0"),
        ({"cu_seqlens_k": torch.tensor([0, 40])}, r"cu_seqlens_k: got 1 sequences, expected those of cu_seqlens_q, 2"),
        ({"cu_seqlens_q": torch.tensor([0.0, 40.0])}, r"cu_seqlens_q: got torch.float32, expected an integer tensor"),
        (
            {"query": torch.randn(1, 4, 40, 64)},
            r"query: got shape \(1, 4, 40, 64\), expected \[tokens, heads",
        ),
        ({"value": torch.randn(39, 2, 64)}, r"value: got shape \(39, 2, 64\), expected that of key"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    operands, bounds = packed([10, 30], [10, 30])
    arguments = dict(zip(("query", "key", "value"), operands, strict=True))
    arguments |= {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1], "scaling": LONG}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        lk.attention_varlen(**(arguments | change))
    assert "\n" not in str(caught.value)
