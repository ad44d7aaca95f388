"""One conformance suite over all backends, and proof that it catches what kernels get wrong."""

import functools

import pytest
import torch
from levels import LEVELS

import longrope_kernels as lk
from longrope_kernels import backends, testing

BACKENDS = [(name, None) for name in backends.NAMES if name != "cpu"] + [("cpu", level) for level in LEVELS]


@pytest.mark.parametrize(("backend", "cpu_level"), BACKENDS, indirect=["cpu_level"])
def test_backend_conforms(backend, cpu_level):
    if reason := backends.unavailable_reason(backend):
        pytest.skip(f"{backend}: {reason}")
    # The reference rests on torch's matrix product, whose bits depend on the shape of the whole batch.
    examples = 60 if cpu_level in (None, LEVELS[0]) else 30
    caches = [False, *("fp8" if x.is_floating_point else "int8" for x in backends.load(backend).QUANTISED)]
    testing.conformance(backend=backend, max_examples=examples, bitwise=backend != "reference", caches=caches)


def broken(change):
    """The reference in float32 terms, its arguments changed by `change` first: a kernel with one known bug."""

    def attention(query, key, value, scaling, **kwargs):
        query, key, value, scaling, kwargs = change(query, key, value, scaling, dict(kwargs))
        return lk.attention(query, key, value, scaling, **kwargs, backend="reference")

    return attention


def ignores(name):
    def change(query, key, value, scaling, kwargs):
        kwargs.pop(name, None)
        return query, key, value, scaling, kwargs

    return change


def regimes(function):
    def change(query, key, value, scaling, kwargs):
        if isinstance(scaling, lk.LongRope):
            scaling = lk.LongRope(
                scaling.original_max_position_embeddings, {length: function(s) for length, s in scaling.regimes.items()}
            )
        else:
            scaling = function(scaling)
        return query, key, value, scaling, kwargs

    return change


def fp32_positions(query, key, value, scaling, kwargs):
    for name in ("query_positions", "key_positions"):
        if name in kwargs:
            kwargs[name] = kwargs[name].float().long().clamp(max=2**31 - 1)
    return query, key, value, scaling, kwargs


def one_regime_for_the_batch(query, key, value, scaling, kwargs):
    return query, key, value, scaling.scalings[-1] if isinstance(scaling, lk.LongRope) else scaling, kwargs


BUGS = {
    "ignores the window": ignores("window"),
    "ignores the softcap": ignores("softcap"),
    "ignores left padding": ignores("key_start"),
    "ignores key_length": ignores("key_length"),
    "ignores explicit query alignment": ignores("query_start"),
    "ignores n-hat": regimes(lambda s: s.replace(start_tokens=0)),
    "ignores the attention factor": regimes(lambda s: s.replace(attention_factor=1.0)),
    "pairs the wrong dims": regimes(lambda s: s.replace(interleaved=not s.interleaved)),
    "keeps positions in float32": fp32_positions,
    "one regime for the whole batch": one_regime_for_the_batch,
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_suite_catches_a_kernel_that(bug):
    with pytest.raises(AssertionError):
        testing.conformance(broken(BUGS[bug]), max_examples=60, gradients=False, bitwise=False)


def test_the_suite_catches_fp32_angles():
    def apply_rope(query, key, scaling, positions, **_):
        angle = positions.float().unsqueeze(-1) * scaling.inv_freq.float()
        return lk.apply_rope(query, key, cos=angle.cos(), sin=angle.sin(), interleaved=scaling.interleaved)

    plain = functools.partial(lk.attention, backend="reference")
    with pytest.raises(AssertionError):
        testing.conformance(plain, apply_rope, max_examples=30, dtypes=[torch.float32], gradients=False, bitwise=False)


def test_the_suite_catches_a_wrong_gradient():
    def attention(query, key, value, scaling, **kwargs):
        result = lk.attention(query, key, value, scaling, **kwargs, backend="reference")
        out = result[0] if isinstance(result, tuple) else result
        skewed = out + 0.05 * (query - query.detach())
        return (skewed, result[1]) if isinstance(result, tuple) else skewed

    with pytest.raises(AssertionError, match="d query"):
        testing.conformance(attention, max_examples=10, bitwise=False)
