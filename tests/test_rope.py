"""What a rotary regime and a ladder of regimes say: frequencies, constructors, selection, and JSON."""

import copy
import json
import math

import mpmath
import pytest
import torch

import longrope_kernels as lk


def test_fixed_point_frequencies_are_correctly_rounded():
    mpmath.mp.prec = 400
    factors = [1.0 + 0.37 * pair for pair in range(64)]
    scaling = lk.RopeScaling(head_dim=128, theta=500000.0, rescale_factors=factors)
    for pair in range(64):
        turn = mpmath.power(500000, mpmath.mpf(-2 * pair) / 128) / (2 * mpmath.pi) / mpmath.mpf(factors[pair])
        assert int(scaling.turns[pair]) % 2**64 == int(mpmath.nint(turn * 2**64)) % 2**64


@pytest.mark.parametrize("position", [0, 1, 8191, 2**20 + 1, 2**31 - 1])
def test_reference_angle_is_exact_at_any_position(position):
    from longrope_kernels.backends import reference

    mpmath.mp.prec = 200
    scaling = lk.RopeScaling(head_dim=64, theta=1e5, rescale_factors=[1.0 + 0.03 * pair for pair in range(32)])
    rotation = scaling.rotation(torch.zeros(1, dtype=torch.int32))
    cos, sin = reference.cos_sin(rotation, torch.tensor([[position]]))
    for pair in range(32):
        angle = position * mpmath.power(10**5, mpmath.mpf(-2 * pair) / 64) / mpmath.mpf(scaling.rescale_factors[pair])
        assert abs(float(cos[0, 0, 0, pair]) - float(mpmath.cos(angle))) < 2 * math.pi * 2**-31
        assert abs(float(sin[0, 0, 0, pair]) - float(mpmath.sin(angle))) < 2 * math.pi * 2**-31


def test_inverse_frequencies_given_directly_are_taken_as_they_are():
    frequencies = torch.tensor([0.7, 0.01, 1e-9], dtype=torch.float64)
    scaling = lk.RopeScaling(head_dim=6, inv_freq=frequencies, rescale_factors=[1, 2, 4])
    assert torch.equal(scaling.base_inv_freq, frequencies)
    assert torch.allclose(scaling.inv_freq, frequencies / torch.tensor([1.0, 2.0, 4.0]), rtol=1e-15)
    mpmath.mp.prec = 200
    assert int(scaling.turns[2]) == int(mpmath.nint(mpmath.mpf(1e-9) / (8 * mpmath.pi) * 2**64))


def test_pi_divides_every_frequency_and_ntk_only_the_slowest_fully():
    pi, ntk = lk.RopeScaling.pi(64, 1e4, 4.0), lk.RopeScaling.ntk(64, 1e4, 4.0)
    assert set(pi.rescale_factors) == {4.0}
    assert ntk.rescale_factors[0] == 1.0
    assert ntk.rescale_factors[-1] == pytest.approx(4.0)
    larger_base = lk.RopeScaling(head_dim=64, theta=1e4 * 4.0 ** (64 / 62))
    assert torch.allclose(ntk.inv_freq, larger_base.inv_freq, rtol=1e-12)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    yarn = lk.RopeScaling.yarn(128, 1e4, 8.0, 4096)
    assert yarn.rescale_factors[0] == 1.0
    assert yarn.rescale_factors[-1] == pytest.approx(8.0)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    lk.check_monotone(yarn.rescale_factors)


def test_a_ladder_selects_the_first_regime_long_enough():
    plain = lk.RopeScaling(head_dim=64, theta=1e4)
    rope = lk.LongRope(
        100,
        {400: plain.replace(rescale_factors=[4.0] * 32), 100: plain, 200: plain.replace(rescale_factors=[2.0] * 32)},
    )
    assert rope.lengths == (100, 200, 400)
    expected = {0: 0, 1: 0, 100: 0, 101: 1, 200: 1, 201: 2, 400: 2, 401: 2, 10**6: 2}
    for length, index in expected.items():
        assert rope.select(length) == rope.scalings[index]
    index = rope.select_index(torch.tensor(list(expected)))
    assert index.dtype == torch.int32
    assert index.tolist() == list(expected.values())


def test_regimes_below_the_original_length_are_the_original_model():
    rope = lk.LongRope.yarn(64, 1e5, 8192, 16384)
    assert rope.select(8192).is_identity
    assert not rope.select(8193).is_identity


def test_json_form_is_lossless():
    plain = lk.RopeScaling(head_dim=96, theta=1e4, rotary_dim=72, interleaved=True)
    long = plain.replace(rescale_factors=[1 / 3 + pair for pair in range(36)], start_tokens=20, attention_factor=1.19)
    rope = lk.LongRope(4096, {4096: plain, 8192: long, 131072: long.replace(start_tokens=0)})
    assert lk.LongRope.from_dict(json.loads(json.dumps(rope.to_dict()))) == rope
    given = lk.LongRope(8, {8: lk.RopeScaling(head_dim=4, inv_freq=[0.1, 0.3])})
    assert lk.LongRope.from_dict(json.loads(json.dumps(given.to_dict()))) == given


def test_equal_values_are_equal_and_hash_alike():
    a, b = (lk.RopeScaling(head_dim=64, theta=1e4, rescale_factors=[2.0] * 32) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != a.replace(start_tokens=1)
    assert a.replace(theta=2e4).theta == 2e4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"theta": 1e4, "rescale_factors": [1.0] * 31}, "rescale_factors: got 31 values, expected 32"),
        ({"theta": 1e4, "rescale_factors": [1.0] * 31 + [math.nan]}, "rescale_factors: got nan at pair 31"),
        ({"theta": 1e4, "rescale_factors": [0.0] + [1.0] * 31}, "rescale_factors: got 0.0 at pair 0"),
        ({"theta": 1e4, "rescale_factors": [2.0] + [1.0] * 31, "monotone": True}, "rescale_factors: got 1.0 at pair 1"),
        ({"theta": 1e4, "rescale_factors": "wide"}, "rescale_factors: got 'wide'"),
        ({"theta": 0.5}, "theta: got 0.5"),
        ({"theta": math.inf}, "theta: got inf"),
        ({}, "theta: got None"),
        ({"theta": 1e4, "inv_freq": [1.0] * 32}, "theta: got 10000.0"),
        ({"inv_freq": [1.0] * 31 + [-1.0]}, "inv_freq: got -1.0 at pair 31"),
        ({"theta": 1e4, "rotary_dim": 63}, "rotary_dim: got 63"),
        ({"theta": 1e4, "rotary_dim": 66}, "rotary_dim: got 66"),
        ({"theta": 1e4, "start_tokens": -1}, "start_tokens: got -1"),
        ({"theta": 1e4, "start_tokens": 1.5}, "start_tokens: got 1.5"),
        ({"theta": 1e4, "attention_factor": 0}, "attention_factor: got 0"),
        ({"theta": 1e4, "head_dim": 0}, "head_dim: got 0"),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments, named):
    with pytest.raises((ValueError, TypeError)) as error:
        lk.RopeScaling(**({"head_dim": 64} | arguments))
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)


def test_bad_ladders_are_named():
    plain = lk.RopeScaling(head_dim=64, theta=1e4)
    with pytest.raises(ValueError, match=r"regimes: got \{\}"):
        lk.LongRope(8192, {})
    with pytest.raises(ValueError, match="regimes: got length 0"):
        lk.LongRope(8192, {0: plain})
    with pytest.raises(ValueError, match="regimes: got theta 20000"):
        lk.LongRope(8192, {8192: plain, 16384: plain.replace(theta=2e4)})
    with pytest.raises(ValueError, match="original_max_position_embeddings: got 0"):
        lk.LongRope(0, {8192: plain})
    with pytest.raises(ValueError, match="max_position_embeddings: got 8192, expected an int above"):
        lk.LongRope.pi(64, 1e4, 8192, 8192)
    with pytest.raises(ValueError, match="length: got -1"):
        lk.LongRope(8192, {8192: plain}).select(-1)
    with pytest.raises(ValueError, match="fields: got format 'other'"):
        lk.LongRope.from_dict({"format": "other"})


FORMAT = {"format": "longrope-kernels/1", "original_max_position_embeddings": 8}
MALFORMED = {
    "original_max_position_embeddings: got 0": lambda: lk.RopeScaling.yarn(64, 1e4, 2.0, 0),
    "head_dim: got 'a'": lambda: lk.RopeScaling.ntk("a", 1e4, 2.0),
    "rotary_dim: got 1.5": lambda: lk.RopeScaling.pi(64, 1e4, 2.0, rotary_dim=1.5),
    "factor: got 0.5": lambda: lk.RopeScaling.dynamic_ntk(64, 1e4, 0.5, 8192, 9000),
    "length: got 0": lambda: lk.RopeScaling.dynamic_ntk(64, 1e4, 2.0, 8192, 0),
    "beta_slow: got 0": lambda: lk.RopeScaling.yarn(64, 1e4, 2.0, 8192, beta_slow=0),
    "beta_fast: got 1, expected a number >= beta_slow": lambda: lk.RopeScaling.yarn(64, 1e4, 2.0, 8192, 1, 32),
    "theta: got 1, expected a finite number > 1": lambda: lk.RopeScaling.yarn(64, 1, 2.0, 8192),
    "regimes: got None, expected a dict": lambda: lk.LongRope(8192, None),
    "fields: got [], expected a dict": lambda: lk.LongRope.from_dict([]),
    "fields: got None, expected a dict": lambda: lk.RopeScaling.from_dict(None),
    "regimes: got 5, expected a list of dicts": lambda: lk.LongRope.from_dict(FORMAT | {"regimes": 5}),
    "regimes: got 3, expected a dict": lambda: lk.LongRope.from_dict(FORMAT | {"regimes": [3]}),
    "config: got None, expected a transformers": lambda: lk.LongRope.from_config(None),
    "hidden_size: got None": lambda: lk.LongRope.from_config({"rope_theta": 1e4, "max_position_embeddings": 5}),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_arguments_are_named_in_one_line(message):
    with pytest.raises((ValueError, TypeError)) as error:
        MALFORMED[message]()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_factors_changed_in_place_are_refused_until_a_new_scaling_is_made_of_them():
    factors = torch.ones(32, dtype=torch.float64, requires_grad=True)
    scaling = lk.RopeScaling(64, 1e4, factors)
    ladder = lk.LongRope(8, {8: scaling})
    x, equal = torch.randn(1, 1, 4, 64), lk.RopeScaling(64, 1e4)
    assert scaling == equal
    lk.attention(x, x, x, scaling).sum().backward()
    torch.optim.SGD([factors], lr=1e-3).step()
    uses = {
        "kernels": lambda: lk.attention(x, x, x, scaling),
        "ladder": lambda: lk.attention(x, x, x, ladder),
        "inv_freq": lambda: scaling.inv_freq,
        "equality": lambda: scaling == equal,
        "hash": lambda: hash(scaling),
        "to_dict": scaling.to_dict,
        "replace": lambda: scaling.replace(start_tokens=4),
    }
    for use in uses.values():
        with pytest.raises(RuntimeError, match=r"rescale_factors: got a tensor that was changed in place .*replace\("):
            use()
    assert "RopeScaling" in repr(scaling)
    renewed = copy.deepcopy(scaling.replace(rescale_factors=factors))
    assert renewed.rescale_factors == tuple(factors.tolist())
    lk.attention(x, x, x, renewed).sum().backward()


def test_the_default_device_does_not_matter():
    x, lengths = torch.randn(2, 2, 4, 64), torch.tensor([4, 400])
    kept = lk.LongRope.yarn(64, 1e5, 128, 256)
    with torch.device("meta"):
        made = lk.LongRope.yarn(64, 1e5, 128, 256)
        assert made == kept
        assert made.scalings[1].replace(start_tokens=3).rotation(lengths.int() * 0).turns.device.type == "cpu"
        assert made.select_index(lengths).tolist() == [0, 1]
        leaf = x.requires_grad_()
        out = lk.attention(leaf, leaf, leaf, made)
        out.sum().backward()
        assert lk.apply_rope(x, x, made)[0].device == x.device
        cache = lk.KVCache(2, 2, 64, 8, torch.float32, page_tokens=4)
        cache.append(x.detach(), x.detach())
        assert torch.equal(cache.attend(x.detach(), made), out)
        with pytest.raises(ValueError, match="rescale_factors: got a meta tensor, expected 32 numbers"):
            lk.RopeScaling(64, 1e4, torch.ones(32))


def test_a_scaling_made_for_inference_serves_training():
    x = torch.randn(1, 2, 4, 64, requires_grad=True)
    with torch.inference_mode():
        scaling = lk.RopeScaling.pi(64, 1e4, 2.0)
        ladder = lk.LongRope(4, {4: scaling})
        lk.attention(x, x, x, scaling)
    for rope in (scaling, ladder):
        lk.attention(x, x, x, rope).sum().backward()
