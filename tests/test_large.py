"""Past the first block: shapes that cross blocks of keys and rows, runs of a decode, groups of scratch."""

import math

import pytest
import torch
from levels import every_level
from torch.nn import functional

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends.composed import gathered

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RUN = 2048  # keys of a decode's run, csrc/cpu/attention_decode.h
SCRATCH_BYTES = 256 << 20  # of a prefill's packed keys and values, csrc/cpu/attention_forward.cpp


def regime(head_dim, start_tokens=5):
    factors = [1.0 + i / 8 for i in range(head_dim // 2)]
    return lk.RopeScaling(head_dim, 1e4, factors, start_tokens=start_tokens, attention_factor=1.1)


def problem(query_tokens, key_tokens, dtype, heads=(4, 2), head_dim=32, start_tokens=5, batch=1, **kwargs):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], query_tokens), *[(heads[1], key_tokens)] * 2]
    operands = [torch.randn(batch, *shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    return testing.Problem(*operands, regime(head_dim, start_tokens), kwargs)


BACKWARD = {
    "causal": {},
    "window": {"window": 150},
    "two-sided window": {"window": (100, 60), "is_causal": False},
    "full, softcap": {"is_causal": False, "softcap": 5.0},
    "padded": {"batch": 2, "key_start": torch.tensor([7, 130]), "key_length": torch.tensor([320, 140])},
    "n-hat in the second block": {"start_tokens": 140},
}


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BACKWARD)
def test_gradients_past_one_block_obey_the_error_rule(case, dtype):
    testing.check_gradients(lk.attention, problem(300, 333, dtype, **BACKWARD[case]))


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BACKWARD)
def test_gradients_summed_over_parts_of_the_queries_obey_the_error_rule(case, dtype):
    """Many query heads a key head: the CPU backward cuts the queries in two or four parts."""
    testing.check_gradients(lk.attention, problem(480, 513, dtype, heads=(10, 1), **BACKWARD[case]))


def packed_attention(query, key, value, scaling, key_length, return_lse):
    """`attention` of a right-padded batch, of whose queries the last are a sequence's, by way of `attention_varlen`."""
    lengths, most = key_length.tolist(), query.shape[2]
    rows = [x[:, most - n :] for x, n in zip(query, lengths, strict=True)]
    slots = [[x[:, :n] for x, n in zip(operand, lengths, strict=True)] for operand in (key, value)]
    operands = [torch.cat(parts, dim=1).transpose(0, 1) for parts in (rows, *slots)]
    bounds = functional.pad(key_length.cumsum(0), (1, 0))
    out, lse = lk.attention_varlen(*operands, bounds, scaling=scaling, return_lse=return_lse)
    outs, lses = out.transpose(0, 1).split(lengths, dim=1), lse.split(lengths, dim=1)
    return (
        torch.stack([functional.pad(x, (0, 0, most - n, 0)) for x, n in zip(outs, lengths, strict=True)]),
        torch.stack([functional.pad(x, (most - n, 0), value=-math.inf) for x, n in zip(lses, lengths, strict=True)]),
    )


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_past_one_block_obey_the_error_rule_backward_too(dtype):
    padded = problem(300, 300, dtype, batch=5, key_length=torch.tensor([0, 130, 1, 300, 0]))
    testing.check_attention(packed_attention, padded)
    testing.check_gradients(packed_attention, padded)


DECODE = {
    "causal": {},
    "n-hat inside the second run": {"start_tokens": RUN + 77},
    "window that hides whole runs": {"window": 70},
    "window from the middle of a run": {"window": 3000},
    "first tokens alone": {"query_start": torch.tensor([10])},
}


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_tokens", [RUN - 1, RUN, RUN + 1, 6200])
@pytest.mark.parametrize("query_tokens", [1, 3])
def test_a_decode_over_several_runs_obeys_the_error_rule(query_tokens, key_tokens, dtype):
    for case in DECODE.values():
        testing.check_attention(lk.attention, problem(query_tokens, key_tokens, dtype, **case))


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_one_batch_have_runs_of_their_own(dtype):
    lengths = torch.tensor([RUN - 1, 0, RUN + 1, 6200, 1, 2 * RUN])
    starts = torch.tensor([5, 6200, RUN, 0, 3000, 31])
    padded = problem(3, 6200, dtype, head_dim=16, start_tokens=RUN + 77, batch=6, key_start=starts, key_length=lengths)
    testing.check_attention(lk.attention, padded)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [None, 64])
@pytest.mark.parametrize("query_tokens", [1, 3, 40])
def test_int8_caches_of_several_runs_obey_the_error_rule(query_tokens, page_tokens, dtype):
    long = problem(query_tokens, 4500, dtype, start_tokens=RUN + 77, batch=2)
    cache = lk.KVCache(2, 2, 32, 4500, dtype, quantised=True, page_tokens=page_tokens)
    cache.append(long.key, long.value, torch.tensor([4500, RUN + 1]))
    held = gathered(cache.pages, torch.float64)
    exact = lk.reference.attention(long.query, *held, long.scaling, key_length=cache.length, return_lse=True)
    rounded = [x.to(dtype) for x in held]
    plain = testing.plain_attention(testing.Problem(long.query, *rounded, long.scaling, {"key_length": cache.length}))
    actual = cache.attend(long.query, long.scaling, return_lse=True)
    for name, *results in zip(("out", "lse"), actual, plain, exact, strict=True):
        testing.assert_within_error_rule(name, *results, angle_floor=2e-6)


@every_level
def test_appending_more_than_a_run_quantises_to_the_bits_of_the_definition():
    tokens = problem(1, RUN + 100, torch.bfloat16, heads=(1, 1), head_dim=16)
    caches = [lk.KVCache(1, 1, 16, RUN + 100, quantised=True, page_tokens=64) for _ in range(2)]
    for cache, backend in zip(caches, (None, "reference"), strict=True):
        cache.append(tokens.key, tokens.value, backend=backend)
    for name in ("key", "value", "key_scale", "value_scale", "key_tail"):
        assert torch.equal(*(getattr(cache.pages, name) for cache in caches)), name


PREFILL = {
    "causal": {},
    "padded, n-hat inside": {
        "start_tokens": 1000,
        "batch": 2,
        "key_start": torch.tensor([100, 2000]),
        "key_length": torch.tensor([RUN + 2, 600]),
    },
    "window": {"window": 700},
}


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PREFILL)
def test_a_long_prefill_obeys_the_error_rule(case, dtype):
    testing.check_attention(lk.attention, problem(520, 2600, dtype, heads=(2, 1), **PREFILL[case]))


@every_level
def test_a_prefill_whose_keys_exceed_the_scratch_is_done_in_groups():
    """Six pairs of a sequence and a head, two of which fit at once: the second group straddles the sequences."""
    heads, tokens, rows, head_dim, window = 3, 200_000, 40, 64, 50
    packed_bytes = 2 * tokens * head_dim * torch.float32.itemsize
    assert 2 * packed_bytes < SCRATCH_BYTES < 3 * packed_bytes
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, rows, head_dim, generator=generator)
    strides = (5 * head_dim, head_dim, head_dim, 1)  # of views that overlap, to save the memory
    key, value = (
        torch.randn(tokens + 20, head_dim, generator=generator).as_strided((2, heads, tokens, head_dim), strides)
        for _ in range(2)
    )
    start = torch.tensor([tokens - rows, 100])  # of the first sequence the last keys are seen, of the second early ones
    scaling = regime(head_dim)
    out, lse = lk.attention(query, key, value, scaling, query_start=start, window=window, return_lse=True)
    for b, first in enumerate(start.tolist()):
        seen = slice(first - window, first + rows)
        cut = testing.Problem(
            query[b : b + 1],
            *(x[b : b + 1, :, seen] for x in (key, value)),
            scaling,
            {"window": window, "query_positions": torch.arange(rows) + first},
        )
        cut.kwargs["key_positions"] = torch.arange(seen.start, seen.stop)
        testing.check_attention(lambda *_, b=b, **__: (out[b : b + 1], lse[b : b + 1]), cut)


FIXED = {  # query tokens, key tokens, heads, batch
    "square": (384, 384, (4, 2), 1),
    "chunk": (200, 1500, (4, 2), 1),
    "decode": (1, 2500, (4, 2), 8),
    "one key head": (500, 500, (8, 1), 1),
}


def assert_rms_within(attention, p, factor=1.1):
    """The root mean square errors of out, lse and the gradients are at most `factor` times the plain computation's."""

    def results(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in p.operands]
        out, lse = function(leaves)
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(p.query.dtype)
        gradients = torch.autograd.grad(out, leaves, slope.to(out.dtype))
        return dict(zip(("out", "lse", "query", "key", "value"), (out, lse, *gradients), strict=True))

    def reference(leaves):
        return lk.attention(*leaves, p.scaling, return_lse=True, backend="reference")

    def plain(leaves):
        return testing.plain_attention(p.replace(**dict(zip(("query", "key", "value"), leaves, strict=True))))

    # Of one query torch's products are of a matrix and a vector, which sum in more parts than a tile of rows can.
    dtype = p.query.dtype
    parts = 1.35 if dtype == torch.float32 and p.query.shape[2] == 1 else 1.0
    exact = results(reference, torch.float64)
    actual = results(lambda leaves: attention(*leaves, p.scaling, return_lse=True), dtype)
    allowed = results(plain, dtype)
    for name, truth in exact.items():
        error, bound = ((x[name].double() - truth).square().mean().sqrt().item() for x in (actual, allowed))
        wider = parts if name in ("key", "value") else 1.0
        assert error <= factor * wider * bound, (
            f"{name}: RMS error {error:.3g}, {error / bound:.3g} x {bound:.3g} (plain)"
        )


def fixed(shape, dtype):
    query_tokens, key_tokens, heads, batch = FIXED[shape]
    return problem(query_tokens, key_tokens, dtype, heads, head_dim=64, batch=batch)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FIXED)
def test_the_rms_error_is_that_of_the_plain_computation(shape, dtype):
    assert_rms_within(lk.attention, fixed(shape, dtype))


@pytest.mark.parametrize("shape", FIXED)
def test_the_rms_error_sees_a_bias_of_half_a_unit_in_the_last_place(shape):
    def biased(*args, **kwargs):
        out, lse = lk.attention(*args, return_lse=True)
        return (out.float() * (1 + 2**-8)).to(out.dtype), lse

    p = fixed(shape, torch.bfloat16)
    testing.assert_within_error_rule(
        "out",
        biased(*p.operands, p.scaling)[0],
        testing.plain_attention(p)[0],
        lk.reference.attention(*p.operands, p.scaling),
    )  # the largest error does not see it
    with pytest.raises(AssertionError, match="RMS error"):
        assert_rms_within(biased, p)
