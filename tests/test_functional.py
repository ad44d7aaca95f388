"""`apply_rope` and `attention` as users meet them: closed forms, defaults, gradients, and bad arguments."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from levels import every_level
from torch.autograd import forward_ad

import longrope_kernels as lk

PLAIN = lk.RopeScaling(head_dim=16, theta=1e3)
LADDER = lk.LongRope(8, {8: PLAIN, 32: PLAIN.replace(rescale_factors=[3.0] * 8, attention_factor=1.2)})


def operands(tokens=12, keys=None, heads=(4, 2), batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = tokens if keys is None else keys
    shapes = ((heads[0], tokens), (heads[1], keys), (heads[1], keys))
    return tuple(torch.randn(batch, h, t, 16, generator=generator, dtype=torch.float64).to(dtype) for h, t in shapes)


def sdpa(query, key, value, scaling, **kwargs):
    """torch's attention over rotated operands, in float64."""
    tokens = torch.arange(key.shape[2])
    angle = tokens.double().unsqueeze(-1) * scaling.inv_freq

    def rotate(x):
        cos, sin = (torch.cat((t, t), -1)[-x.shape[2] :] for t in (angle.cos(), angle.sin()))
        half = torch.cat((-x[..., 8:], x[..., :8]), -1)
        return (x * cos + half * sin) * scaling.attention_factor

    return torch.nn.functional.scaled_dot_product_attention(
        rotate(query), rotate(key), value, enable_gqa=True, **kwargs
    )


def test_plain_rope_attention_is_torchs():
    q, k, v = operands()
    out = lk.reference.attention(q, k, v, PLAIN)
    assert torch.allclose(out, sdpa(q, k, v, PLAIN, is_causal=True), atol=1e-7)


def test_fewer_queries_than_keys_align_at_the_end():
    q, k, v = operands(tokens=12)
    whole = lk.reference.attention(q, k, v, PLAIN)
    last = lk.reference.attention(q[:, :, 9:], k, v, PLAIN)
    assert torch.allclose(last, whole[:, :, 9:], atol=1e-12)


def test_no_scaling_means_no_rotation():
    q, k, v = operands()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(lk.reference.attention(q, k, v, None, is_causal=False), expected, atol=1e-12)


def test_each_sequence_gets_the_regime_of_its_own_length():
    q, k, v = operands(batch=2)
    length = torch.tensor([5, 12])
    out = lk.reference.attention(q[:, :, :5], k, v, LADDER, key_length=length)
    for b, scaling in enumerate((PLAIN, LADDER.select(12))):
        rows = slice(b, b + 1)
        alone = lk.reference.attention(q[rows, :, :5], k[rows], v[rows], scaling, key_length=length[rows])
        assert torch.equal(out[rows], alone)
    forced = lk.reference.attention(q, k, v, LADDER, regime_index=torch.tensor([1, 0], dtype=torch.int32))
    assert torch.equal(forced[1:], lk.reference.attention(q[1:], k[1:], v[1:], PLAIN))


def test_a_window_counts_the_query_itself():
    q, k, v = operands()
    out = lk.reference.attention(q, k, v, PLAIN, window=1)
    assert torch.allclose(out, v.repeat_interleave(2, 1), atol=1e-12)
    pair = lk.reference.attention(q, k, v, PLAIN, window=(2, 0), is_causal=False)
    assert torch.allclose(pair, lk.reference.attention(q, k, v, PLAIN, window=3), atol=1e-12)


def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity():
    q, k, v = operands()
    out, lse = lk.reference.attention(q, k, v, PLAIN, key_length=torch.tensor([0, 4]), return_lse=True)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], -math.inf))
    assert torch.isinf(lse[1, :, :8]).all()
    assert torch.isfinite(lse[1, :, 8:]).all()


def test_split_halves_merge_through_lse_and_so_do_their_gradients():
    q, k, v = (x.requires_grad_() for x in operands())
    whole = lk.reference.attention(q, k, v, PLAIN, is_causal=False)
    at = torch.arange(12)
    parts = [
        lk.reference.attention(
            q,
            k[:, :, half],
            v[:, :, half],
            PLAIN,
            is_causal=False,
            return_lse=True,
            query_positions=at,
            key_positions=at[half],
        )
        for half in (slice(0, 5), slice(5, 12))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp().unsqueeze(-1) for out, part in parts)
    assert torch.allclose(merged, whole, atol=1e-12)
    weight = torch.sin(torch.arange(whole.numel())).view_as(whole)
    for a, b in zip(
        torch.autograd.grad((merged * weight).sum(), (q, k, v)),
        torch.autograd.grad((whole * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)


def test_gradients_match_finite_differences_rescale_factors_included():
    q, k, v = (x[:1, :, :7].clone().requires_grad_() for x in operands())
    factors = torch.full((6,), 1.3, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, factors):
        scaling = lk.RopeScaling(
            head_dim=16, theta=100.0, rotary_dim=12, rescale_factors=factors, start_tokens=2, attention_factor=1.1
        )
        return lk.attention(q, k, v, scaling, softcap=3.0, window=4, return_lse=True, backend="reference")

    # The angle is quantised to 2^-32 turn, so steps are long and the tolerance is what they leave.
    assert torch.autograd.gradcheck(attend, (q, k, v, factors), eps=1e-3, atol=1e-4)

    def rotate(q, k, factors):
        scaling = lk.RopeScaling(head_dim=16, theta=100.0, rescale_factors=factors, rotary_dim=12, interleaved=True)
        return lk.apply_rope(q, k, scaling, backend="reference")

    assert torch.autograd.gradcheck(rotate, (q, k, factors), eps=1e-3, atol=1e-4)


def test_frequency_gradient_does_not_change_when_all_positions_move():
    q, k, v = operands()
    gradients = []
    for offset in (0, 10**6):
        factors = torch.full((8,), 2.0, dtype=torch.float64, requires_grad=True)
        scaling = lk.RopeScaling(head_dim=16, theta=1e3, rescale_factors=factors)
        at = torch.arange(12) + offset
        out = lk.attention(q, k, v, scaling, query_positions=at, key_positions=at, backend="reference")
        gradients.append(torch.autograd.grad((out * out.detach().cos()).sum(), factors)[0])
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_one_tensor_can_be_rotated_alone():
    q, k, _ = operands()
    alone, none = lk.apply_rope(q, None, PLAIN, backend="reference")
    assert none is None
    assert torch.equal(alone, lk.apply_rope(q, k, PLAIN, backend="reference")[0])


def test_tables_are_used_as_they_are():
    q, k, _ = operands(dtype=torch.float32)
    angle = torch.arange(12.0).unsqueeze(-1) * PLAIN.inv_freq.float()
    by_table = lk.apply_rope(q, k, cos=angle.cos(), sin=angle.sin())
    exact = lk.reference.apply_rope(q, k, PLAIN)
    for ours, theirs in zip(by_table, exact, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)


def test_rotation_by_ones_is_plain_rope_and_conjugation_undoes_it():
    q, k, _ = operands()
    same = lk.reference.apply_rope(q, k, PLAIN.replace(rescale_factors=[1.0] * 8))
    assert torch.equal(same[0], lk.reference.apply_rope(q, k, PLAIN)[0])
    leaf = q.clone().requires_grad_()
    rotated = lk.apply_rope(leaf, None, PLAIN, backend="reference")[0]
    (back,) = torch.autograd.grad(rotated, leaf, rotated.detach())
    assert torch.allclose(back, q, atol=1e-12)


@every_level
@pytest.mark.parametrize("shape", [(0, 4, 3, 16), (2, 4, 0, 16)])
def test_empty_tensors_work(shape):
    q = torch.zeros(shape, requires_grad=True)
    out, lse = lk.attention(q, q, q, LADDER, return_lse=True)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    out.sum().backward()
    assert lk.apply_rope(q, q, LADDER)[0].shape == shape
    keyless = lk.attention(torch.ones(1, 4, 3, 16), torch.ones(1, 2, 0, 16), torch.ones(1, 2, 0, 16), PLAIN)
    assert torch.equal(keyless, torch.zeros_like(keyless))


Q, K, V = operands(dtype=torch.float32)
INTEGERS = torch.tensor([1, 2])
BAD = {
    "query: got shape (4, 12, 16), expected [batch": lambda: lk.attention(Q[0], K, V, PLAIN),
    "query: got list": lambda: lk.attention([1], K, V, PLAIN),
    "query: got torch.int64": lambda: lk.attention(Q.long(), K, V, PLAIN),
    "query: got head_dim 512": lambda: lk.attention(*(torch.zeros(1, 1, 1, 512),) * 3, None),
    "query: got stride 2 in the last": lambda: lk.attention(torch.zeros(2, 4, 12, 32)[..., ::2], K, V, PLAIN),
    "key: got torch.float16": lambda: lk.attention(Q, K.half(), V, PLAIN),
    "key: got device meta": lambda: lk.attention(Q, K.to("meta"), V, PLAIN),
    "key: got batch 1": lambda: lk.attention(Q, K[:1], V, PLAIN),
    "key: got 3 heads": lambda: lk.attention(Q, torch.zeros(2, 3, 12, 16), torch.zeros(2, 3, 12, 16), PLAIN),
    "value: got 11 tokens": lambda: lk.attention(Q, K, V[:, :, 1:], PLAIN),
    "scaling: got float": lambda: lk.attention(Q, K, V, 1.0),
    "scaling: got head_dim 64": lambda: lk.attention(Q, K, V, lk.RopeScaling(head_dim=64, theta=1e4)),
    "scale: got nan": lambda: lk.attention(Q, K, V, PLAIN, scale=math.nan),
    "softcap: got -1": lambda: lk.attention(Q, K, V, PLAIN, softcap=-1),
    "window: got 0": lambda: lk.attention(Q, K, V, PLAIN, window=0),
    "window: got (1, -2)": lambda: lk.attention(Q, K, V, PLAIN, window=(1, -2)),
    "query_positions: got shape (3,)": lambda: lk.attention(Q, K, V, PLAIN, query_positions=torch.arange(3)),
    "key_positions: got torch.float32": lambda: lk.attention(Q, K, V, PLAIN, key_positions=torch.zeros(12)),
    "key_positions: got -1": lambda: lk.attention(Q, K, V, PLAIN, key_positions=torch.arange(12) - 1),
    "positions: got 2147483648": lambda: lk.apply_rope(Q, K, PLAIN, torch.arange(12) + 2**31 - 11),
    "key_start: got shape (1,)": lambda: lk.attention(Q, K, V, PLAIN, key_start=INTEGERS[:1]),
    "key_start: got 13": lambda: lk.attention(Q, K, V, PLAIN, key_start=INTEGERS + 11),
    "key_length: got 14": lambda: lk.attention(Q, K, V, PLAIN, key_length=INTEGERS + 12),
    "key_length: got key_start + key_length = 14 in sequence 1": lambda: lk.attention(
        Q, K, V, PLAIN, key_start=INTEGERS, key_length=INTEGERS + 10
    ),
    "key_length: got list": lambda: lk.attention(Q, K, V, PLAIN, key_length=[1, 2]),
    "regime_index: got a tensor": lambda: lk.attention(Q, K, V, PLAIN, regime_index=INTEGERS),
    "regime_index: got 2": lambda: lk.attention(Q, K, V, LADDER, regime_index=INTEGERS),
    "backend: got 'gpu', expected one of": lambda: lk.attention(Q, K, V, PLAIN, backend="gpu"),
    "key_positions: got None": lambda: lk.apply_rope(Q, K[:, :, :3], PLAIN, torch.arange(12)),
    "cos: got tables beside": lambda: lk.apply_rope(Q, K, PLAIN, cos=torch.zeros(12, 8), sin=torch.zeros(12, 8)),
    "cos: got shape (3, 8)": lambda: lk.apply_rope(Q, K, cos=torch.zeros(3, 8), sin=torch.zeros(12, 8)),
    "sin: got None": lambda: lk.apply_rope(Q, K, cos=torch.zeros(12, 8)),
    "cos: got list, expected a tensor": lambda: lk.apply_rope(Q, K, cos=[1.0], sin=[1.0]),
    "cos: got shape ()": lambda: lk.apply_rope(Q, K, cos=torch.tensor(1.0), sin=torch.tensor(1.0)),
    "query: got torch.sparse_coo": lambda: lk.attention(Q.to_sparse(), K, V, PLAIN),
    "query: got a nested tensor": lambda: lk.attention(torch.nested.nested_tensor([Q[0]]), K, V, PLAIN),
    "value: got a nested": lambda: lk.attention(Q, K, torch.nested.nested_tensor([V[0]], layout=torch.jagged), PLAIN),
    "backend: got 3, expected a name or None": lambda: lk.attention(Q, K, V, PLAIN, backend=3),
    "is_causal: got 'no', expected True or False": lambda: lk.attention(Q, K, V, PLAIN, is_causal="no"),
    "softcap: got 1e+300": lambda: lk.attention(Q, K, V, PLAIN, softcap=1e300),
    "softcap: got 1e-60": lambda: lk.attention(Q, K, V, PLAIN, softcap=1e-60),
    "scale: got 1e+300": lambda: lk.attention(Q, K, V, PLAIN, scale=1e300),
    "scale: got tensor([[0., 0.": lambda: lk.attention(Q, K, V, PLAIN, scale=torch.zeros(99, 99)),
    "window: got (1.5, 0)": lambda: lk.attention(Q, K, V, PLAIN, window=(1.5, 0)),
    "query_start: got 2147483640": lambda: lk.attention(Q, K, V, PLAIN, query_start=INTEGERS * 0 + 2**31 - 8),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_in_one_line(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message]()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@every_level
def test_numbers_of_any_library_are_taken_and_a_window_of_any_size():
    expected = lk.attention(Q, K, V, PLAIN, scale=0.125, window=3)
    assert torch.equal(lk.attention(Q, K, V, PLAIN, scale=np.float32(0.125), window=np.int64(3)), expected)
    assert torch.equal(lk.attention(Q, K, V, PLAIN, scale=Fraction(1, 8), window=3), expected)
    everything = lk.attention(Q, K, V, PLAIN, is_causal=False)
    for side in (2**31 - 1, 2**31, sys.maxsize, 2**64):
        assert torch.equal(lk.attention(Q, K, V, PLAIN, is_causal=False, window=(side, side)), everything)
        assert torch.equal(lk.attention(Q, K, V, PLAIN, window=side), lk.attention(Q, K, V, PLAIN))


def test_forward_mode_is_refused_rather_than_zero():
    bounds = torch.tensor([0, 12])
    packed = [x[0].transpose(0, 1).contiguous() for x in (Q, K, V)]
    for f, x in (
        (lambda q: lk.attention(q, K, V, PLAIN), Q),
        (lambda v: lk.attention(Q, K, v, PLAIN), V),
        (lambda k: lk.apply_rope(Q, k, PLAIN)[1], K),
        (lambda k: lk.attention_varlen(packed[0], k, packed[2], bounds), packed[1]),
        (lambda f: lk.RopeScaling(16, 1e3, f).inv_freq, torch.ones(8)),
    ):
        with pytest.raises(TypeError, match=r"^\w+: got a tensor with a forward-mode tangent, expected none"):
            torch.func.jvp(f, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level(), pytest.raises(TypeError, match="forward-mode"):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
    cos, sin = torch.ones(12, 8), torch.zeros(12, 8)
    _, tangent = torch.func.jvp(lambda q: lk.apply_rope(q, None, cos=cos, sin=sin)[0], (Q,), (Q,))
    assert torch.equal(tangent, Q)  # tables are plain torch
