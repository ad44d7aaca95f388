"""Caches of unrotated keys: contiguous and paged, plain, int8 and fp8, read by every backend alike."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import every_backend_and_level, every_level

import longrope_kernels as lk
from longrope_kernels import backends, testing
from longrope_kernels.backends.composed import gathered
from longrope_kernels.bundles import KEY_GROUP

PLAIN = lk.RopeScaling(head_dim=64, theta=1e4)
LONG = PLAIN.replace(rescale_factors=[1.0 + i / 8 for i in range(32)], start_tokens=5, attention_factor=1.1)
LADDER = lk.LongRope(100, {100: PLAIN, 4000: LONG})
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
USABLE = [name for name in ("cpu", "reference") if backends.unavailable_reason(name) is None]
FORMATS = [False, "int8", "fp8"]
KINDS = [(quantised, page) for quantised in (False, True) for page in (None, 64)]
FP8_KINDS = [("fp8", page) for page in (None, 64)]  # of the reference alone, among the backends that run here


def tokens(count, dtype=torch.float32, batch=2, heads=2, head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, count, head_dim, generator=generator).to(dtype) for _ in range(2)]


def filled(lengths, dtype=torch.float32, quantised=False, page_tokens=None, capacity=600, head_dim=64, **options):
    cache = lk.KVCache(len(lengths), 2, head_dim, capacity, dtype, quantised, page_tokens, **options)
    key, value = tokens(max(lengths), dtype, len(lengths), head_dim=head_dim)
    cache.append(key, value, torch.tensor(lengths))
    return cache, key, value


def queries(count, dtype=torch.float32, batch=2, heads=8, head_dim=64):
    return torch.randn(batch, heads, count, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [None, 1, 7, 64])
@pytest.mark.parametrize("query_tokens", [1, 3, 40])
def test_reading_a_cache_gives_the_bits_of_attention_over_its_keys(dtype, page_tokens, query_tokens):
    lengths = [300, 77]
    cache, key, value = filled(lengths, dtype, page_tokens=page_tokens)
    query = queries(query_tokens, dtype)
    out, lse = cache.attend(query, LADDER, return_lse=True, window=200)
    length = torch.tensor(lengths)
    expected, expected_lse = lk.attention(query, key, value, LADDER, key_length=length, return_lse=True, window=200)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 256])
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=3),
    st.sampled_from(KINDS),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([None, 0.5]),
)
def test_every_kind_of_cache_obeys_the_error_rule(dtype, head_dim, lengths, kind, query_tokens, interleaved, partial):
    cache, _, _ = filled(lengths, dtype, *kind, head_dim=head_dim)
    rotary = head_dim if partial is None else int(head_dim * partial) // 2 * 2
    scaling = lk.RopeScaling(head_dim, 1e4, [2.0] * (rotary // 2), 7, 1.1, rotary, interleaved)
    query = queries(query_tokens, dtype, len(lengths), head_dim=head_dim)
    testing.check_reading(cache, query, scaling)


# Keys whose channels differ, or of few channels, and queries that match: what rounding to a common step could lose.
def unlike_channels(head_dim, generator):
    scale = torch.ones(head_dim)
    scale[3], scale[head_dim // 2 + 7] = 30.0, 80.0
    return scale, 1.0 / scale


def loud_channels(head_dim, generator):
    scale = unlike_channels(head_dim, generator)[0].sqrt() / 2
    return scale, scale


def lognormal_channels(head_dim, generator):
    scale = torch.exp(2 * torch.randn(head_dim, generator=generator))
    return scale, 1.0 / scale


def sparse_rows(head_dim, generator):
    return [4.0 * (torch.rand(tokens, head_dim, generator=generator) < 0.05) for tokens in (512, 2)]


def peaked(head_dim, generator):
    return torch.full((head_dim,), 4.0), torch.full((head_dim,), 4.0)


@every_level
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", [unlike_channels, loud_channels, lognormal_channels, sparse_rows, peaked])
def test_int8_products_lose_less_than_bf16_products_of_the_same_keys(kind, head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    key_scale, query_scale = kind(head_dim, generator)
    key, value = (x * by for x, by in zip(tokens(512, batch=1, head_dim=head_dim), (key_scale, 1.0), strict=True))
    value = value * torch.exp(2 * torch.randn(512, 1, generator=generator))
    cache = lk.KVCache(1, 2, head_dim, 512, torch.bfloat16, quantised=True)
    cache.append(key.bfloat16(), value.bfloat16())
    query = (queries(2, batch=1, head_dim=head_dim) * query_scale).bfloat16()
    scaling = lk.RopeScaling(head_dim, 1e4, [1.5] * (head_dim // 2), 7, 1.1)
    found = cache.attend(query, scaling, return_lse=True)
    held = gathered(cache.pages, torch.float64)
    exact = lk.reference.attention(query, *held, scaling, return_lse=True)
    rounded = [x.bfloat16() for x in held]
    plain = testing.plain_attention(testing.Problem(query, *rounded, scaling, {}))
    for actual, same, truth in zip(found, plain, exact, strict=True):
        error, allowed = ((x.double() - truth).square().mean().sqrt() for x in (actual, same))
        assert error <= allowed


@every_backend_and_level
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cache_holds_does_not_depend_on_how_the_appending_was_cut(kind, backend):
    check_cuts(kind, backend)


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_what_an_fp8_cache_holds_does_not_depend_on_how_the_appending_was_cut(kind):
    check_cuts(kind, "reference")


def check_cuts(kind, backend):
    key, value = tokens(200, torch.bfloat16)
    caches = []
    for cuts in ([200], [1] * 30 + [170], [63, 1, 64, 65, 7]):
        cache = lk.KVCache(2, 2, 64, 256, torch.bfloat16, *kind)
        at = 0
        for cut in cuts:
            part = slice(at, at + cut)
            cache.append(key[:, :, part], value[:, :, part], backend=backend)
            at += cut
        caches.append(cache)
    for other in caches[1:]:
        for a, b in zip(gathered(caches[0].pages, torch.float32), gathered(other.pages, torch.float32), strict=True):
            assert torch.equal(a, b)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_quantise_to_the_same_bits(dtype):
    key, value = tokens(150, dtype)
    held = []
    for backend in USABLE:
        cache = lk.KVCache(2, 2, 64, 256, dtype, quantised=True)
        cache.append(key, value, backend=backend)
        held.append(cache.pages)
    for name in ("key", "value", "key_scale", "value_scale", "key_tail"):
        first, *others = (getattr(pages, name) for pages in held)
        for other in others:
            assert torch.equal(first, other), name


@pytest.mark.skipif(backends.unavailable_reason("cpu") is not None, reason="the native module is not built")
def test_python_and_the_kernels_agree_on_the_group_of_keys():
    assert backends.load("cpu")._native.KEY_GROUP == KEY_GROUP


def test_int8_keys_and_values_are_within_half_a_step():
    cache, key, value = filled([256, 256], quantised=True)
    held_key, held_value = gathered(cache.pages, torch.float32)
    groups = key.unflatten(2, (4, 64)).abs().amax(3, keepdim=True) / 127
    assert ((held_key - key).unflatten(2, (4, 64)).abs() <= groups * 0.5001).all()
    assert ((held_value - value).abs() <= value.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()


def test_fp8_keys_and_values_are_within_half_a_step():
    """Of 3 bits of mantissa, down to 2^-6 of a scale; below that steps are 2^-9 of one."""
    cache, key, value = filled([256, 256], quantised="fp8")
    held_key, held_value = gathered(cache.pages, torch.float32)
    groups = (key.unflatten(2, (4, 64)).abs().amax(3, keepdim=True) / 448).expand(-1, -1, -1, 64, -1).flatten(2, 3)
    for held, x, scale in ((held_key, key, groups), (held_value, value, value.abs().amax(-1, keepdim=True) / 448)):
        step = torch.maximum(x.abs() * 2**-3, scale * 2**-9)
        assert ((held - x).abs() <= step * 0.5001).all()
        assert ((held - x).abs() > step * 0.1).any()


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_the_largest_magnitude_is_kept_and_zeros_and_the_tiniest_are_zeros(quantised):
    key, value = tokens(64, batch=1)
    value[0, 0, 3] = 0.0
    value[0, 0, 4] = torch.where(torch.arange(64) == 7, 1e-40, 0.0)  # the inverse of its scale is no float32
    cache = lk.KVCache(1, 2, 64, 64, torch.float32, quantised)
    cache.append(key, value, backend="reference")
    held_key, held_value = gathered(cache.pages, torch.float32)
    assert torch.allclose(held_key.abs().amax(2), key.abs().amax(2))
    assert torch.allclose(held_value.abs().amax(-1)[:, 1], value.abs().amax(-1)[:, 1])
    assert (held_value[0, 0, 3:5] == 0).all()


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_keys_wait_in_full_precision_until_their_group_is_whole(quantised):
    cache, key, _ = filled([100, 63], torch.bfloat16, quantised=quantised)
    held, _ = gathered(cache.pages, torch.bfloat16)
    assert torch.equal(held[0, :, 64:100], key[0, :, 64:100])
    assert torch.equal(held[1, :, :63], key[1, :, :63])
    assert not torch.equal(held[0, :, :64], key[0, :, :64])


@every_level
def test_a_value_that_is_not_finite_is_seen_by_whoever_reads_it():
    key, value = tokens(64, torch.bfloat16)
    value[0, 0, 3, 5] = torch.inf
    cache = lk.KVCache(2, 2, 64, 64, torch.bfloat16, quantised=True)
    cache.append(key, value)
    out = cache.attend(queries(1, torch.bfloat16), PLAIN)
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_fp8_cache_shows_what_is_not_finite(bad):
    key, value = tokens(64)
    key[1, 1, 20, 9], value[0, 0, 3, 5] = bad, bad
    cache = lk.KVCache(2, 2, 64, 64, torch.float32, quantised="fp8")
    cache.append(key, value, backend="reference")
    assert cache.pages.key_scale[1, 1, 0].isnan().nonzero().flatten().tolist() == [9]
    assert cache.pages.value_scale.isnan().nonzero().tolist() == [[0, 0, 3]]
    out = cache.attend(queries(1), PLAIN, backend="reference")
    assert out[0, :4].isnan().all()
    assert out[1, 4:].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1, :4].isfinite().all()


@pytest.mark.skipif("cpu" not in USABLE, reason="the native module is not built")
def test_the_cpu_kernels_refuse_an_fp8_cache_and_the_reference_takes_it():
    cache, key, value = filled([70, 70], quantised="fp8")
    refusal = "expected one that can run {} here: no kernels for caches of torch.float8_e4m3fn$"
    with pytest.raises(lk.BackendUnavailableError, match=refusal.format("attention_paged")):
        cache.attend(queries(1), PLAIN, backend="cpu")
    with pytest.raises(lk.BackendUnavailableError, match=refusal.format("cache_append")):
        cache.append(key, value, backend="cpu")
    assert cache.length.tolist() == [70, 70]
    expected = cache.attend(queries(1), PLAIN, backend="reference")
    assert torch.equal(cache.attend(queries(1), PLAIN), expected)


@every_level
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_key_or_query_that_is_not_finite_makes_the_rows_that_see_it_not_a_number(head_dim):
    key, value = tokens(192, torch.bfloat16, head_dim=head_dim)
    key[0, 0, 70, 5] = -torch.inf  # of the second group of keys, seen by the first four heads
    cache = lk.KVCache(2, 2, head_dim, 192, torch.bfloat16, quantised=True)
    cache.append(key, value)
    query = queries(1, torch.bfloat16, head_dim=head_dim)
    query[1, 6, 0, 1] = torch.nan
    out, lse = cache.attend(query, lk.RopeScaling(head_dim, 1e4), return_lse=True)
    for result in (out.isnan().all(-1), lse.isnan()):
        assert result[0, :4].all()
        assert result[1, 6].all()
        assert result.sum() == 5
    assert out.isnan().sum() == 5 * head_dim


@every_level
@pytest.mark.parametrize("loud", [20.0, 25.0, 30.0, 100.0, 1000.0])
def test_a_channel_that_is_loud_in_one_key_of_a_group_costs_the_others_nothing(loud):
    """Its score is far below the others', whose weights are then all that is seen."""
    key, value = tokens(64, batch=8, head_dim=128)
    key[..., (5, 69)] = 0.0
    key[:, :, 0, 5] = -loud
    query = 2 * queries(1, batch=8, head_dim=128)
    query[..., 5], query[..., 69] = loud, 0.0
    cache = lk.KVCache(8, 2, 128, 64, torch.bfloat16, quantised=True)
    cache.append(key.bfloat16() / 2, value.bfloat16())
    scaling = lk.RopeScaling(128, 1e4, [1.5] * 64)
    query = query.bfloat16()
    held = gathered(cache.pages, torch.float64)
    exact = lk.reference.attention(query, *held, scaling)
    plain, _ = testing.plain_attention(testing.Problem(query, *(x.bfloat16() for x in held), scaling, {}))
    testing.assert_within_error_rule("out", cache.attend(query, scaling), plain, exact)


@every_level
@pytest.mark.parametrize("size", [1e-30, 1e-33, 1e-35])
def test_tiny_int8_values_keep_their_sign_and_size(size):
    key, value = tokens(129, torch.bfloat16)
    cache = lk.KVCache(2, 2, 64, 129, torch.bfloat16, quantised=True)
    cache.append(key, (1 + value / 10) * size)
    exact = lk.reference.attention(queries(1, torch.bfloat16), *gathered(cache.pages, torch.float64), PLAIN)
    out = cache.attend(queries(1, torch.bfloat16), PLAIN)
    assert torch.allclose(out.double(), exact, rtol=0.01, atol=0.0)


@every_level
def test_zeros_stay_numbers_where_subnormals_are_flushed():
    key, value = tokens(128, torch.bfloat16)
    key[:, :, 64:] = 0.0
    cache = lk.KVCache(2, 2, 64, 128, torch.bfloat16, quantised=True)
    query = queries(1, torch.bfloat16)
    query[:, ::2] = 0.0
    assert torch.set_flush_denormal(True)
    try:
        cache.append(key, value)
        out = cache.attend(query, PLAIN)
    finally:
        torch.set_flush_denormal(False)
    exact = lk.reference.attention(query, *gathered(cache.pages, torch.float64), PLAIN)
    assert torch.allclose(out.double(), exact, atol=0.01)


@every_level
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("step", [-128, 127])
def test_the_largest_int8_products_do_not_overflow(head_dim, step):
    cache = lk.KVCache(1, 1, head_dim, 64, torch.bfloat16, quantised=True)
    key, value = tokens(64, torch.bfloat16, batch=1, heads=1, head_dim=head_dim)
    cache.append(torch.ones_like(key), value)
    cache.pages.key.fill_(step)
    query = torch.ones(1, 4, 1, head_dim, dtype=torch.bfloat16)
    scaling, start = lk.RopeScaling(head_dim, 1e4), torch.tensor([0])  # not turned against the first key
    out, lse = cache.attend(query, scaling, is_causal=False, query_start=start, return_lse=True)
    exact, exact_lse = lk.reference.attention(
        query,
        *gathered(cache.pages, torch.float64),
        scaling,
        is_causal=False,
        query_positions=torch.tensor([0]),
        return_lse=True,
    )
    assert torch.allclose(out.double(), exact, atol=0.01)
    assert torch.allclose(lse.double(), exact_lse, atol=0.01)


@every_level
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30])
def test_products_of_tiny_and_huge_int8_operands_stay_finite(scale):
    key, value = (x * scale for x in tokens(128, torch.bfloat16))
    cache = lk.KVCache(2, 2, 64, 128, torch.bfloat16, quantised=True)
    cache.append(key, value)
    query = queries(1, torch.bfloat16) / max(scale, 1.0)
    exact = lk.reference.attention(query, *gathered(cache.pages, torch.float64), PLAIN)
    assert torch.allclose(cache.attend(query, PLAIN).double(), exact, rtol=0.02, atol=0.02 * scale)


@every_level
def test_a_change_of_regime_leaves_no_stale_phase():
    cache, key, value = filled([100, 100], capacity=200)
    more_key, more_value = tokens(1, seed=3)
    query = queries(1)
    before = cache.attend(query, LADDER)
    assert torch.equal(before, lk.attention(query, key, value, PLAIN))
    cache.append(more_key, more_value)
    after = cache.attend(query, LADDER)
    whole = [torch.cat(pair, 2) for pair in ((key, more_key), (value, more_value))]
    assert torch.equal(after, lk.attention(query, *whole, LONG))


@every_level
def test_many_queries_read_what_one_at_a_time_reads():
    cache, key, value = filled([300, 300])
    query = queries(4)
    together = cache.attend(query, LONG)
    for t in range(4):
        one = lk.attention(query[:, :, t : t + 1], key[:, :, : 297 + t], value[:, :, : 297 + t], LONG)
        assert torch.allclose(together[:, :, t : t + 1], one, atol=2e-6)


def test_released_pages_are_used_again():
    cache, _, _ = filled([128, 128], page_tokens=64, capacity=128)
    assert cache.free == []
    cache.release(0)
    assert sorted(cache.free) == [0, 1]
    key, value = tokens(65, seed=4)
    cache.append(key, value, torch.tensor([65, 0]))
    assert cache.length.tolist() == [65, 128]
    out = cache.attend(queries(1), PLAIN)
    assert torch.equal(out[0], lk.attention(queries(1)[:1], key[:1], value[:1], PLAIN)[0])


@pytest.mark.parametrize("quantised", FORMATS)
@pytest.mark.parametrize("page_tokens", [None, 64])
def test_a_truncated_cache_is_one_that_never_held_more(quantised, page_tokens):
    shape = {"quantised": quantised, "page_tokens": page_tokens}
    key, value = tokens(100, batch=1)
    cache, fresh = (lk.KVCache(1, 2, 64, 256, torch.float32, **shape) for _ in range(2))
    cache.append(key, value)
    cache.truncate(0, 70)
    fresh.append(key[:, :, :70], value[:, :, :70])
    query = queries(1)[:1]
    assert torch.equal(cache.attend(query, PLAIN), fresh.attend(query, PLAIN))
    for both in (cache, fresh):
        both.append(key[:, :, :40], value[:, :, :40])
    assert torch.equal(cache.attend(query, PLAIN), fresh.attend(query, PLAIN))
    assert len(cache.free) == len(fresh.free)


def test_a_truncation_that_cannot_be_is_refused():
    cache = lk.KVCache(1, 2, 64, 256, torch.float32, quantised=True)
    cache.append(*tokens(70, batch=1))
    with pytest.raises(ValueError, match=r"^tokens: got 60, expected 0, or from 64 to the 70 tokens of sequence 0$"):
        cache.truncate(0, 60)
    with pytest.raises(ValueError, match=r"^tokens: got 71, expected 0, or from 64"):
        cache.truncate(0, 71)
    cache.truncate(0, 0)
    assert cache.length.tolist() == [0]


def test_append_to_a_negative_length_is_refused():
    stored = (torch.zeros(1, 2, 64, 64) for _ in range(2))
    pages = lk.Pages(*stored, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-5]))
    with pytest.raises(ValueError, match=r"^length: got -5, expected values in \[0, 64\]$"):
        lk.cache_append(*tokens(4, batch=1), pages)
    assert not pages.key.any()


def test_pages_of_two_dtypes_are_refused():
    key, value = torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    pages = lk.Pages(key, value, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"^value_pages: got torch.float16, expected torch.float32, as key_pages$"):
        lk.cache_append(*tokens(4, batch=1), pages)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [15, 16, 17, 33, 64, 65])
def test_many_queries_at_the_end_are_what_the_whole_sequence_gives_there(cpu_level, rows, dtype):
    """Up to 64 rows of a key head in passes of 16, beyond by blocks: one function of the sequence."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 2200, 64, generator=generator).to(dtype) for heads in (1, 1, 1))
    out, lse = lk.attention(query[:, :, -rows:], key, value, LADDER, return_lse=True)
    exact = (query[:, :, -rows:].double(), key.double(), value.double())
    expected, expected_lse = lk.attention(*exact, LADDER, return_lse=True, backend="reference")
    assert (out - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max() + 1e-6
    assert (lse - expected_lse).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


@every_level
def test_an_empty_sequence_gives_zero():
    cache = lk.KVCache(2, 2, 64, 10, torch.float32)
    key, value = tokens(3)
    cache.append(key, value, torch.tensor([3, 0]))
    out, lse = cache.attend(queries(1), PLAIN, return_lse=True)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out[0].abs().sum() > 0


@pytest.mark.parametrize("quantised", [True, "int8", "fp8"])
def test_a_quantised_cache_takes_half_the_memory(quantised):
    plain, small = (lk.KVCache(1, 8, 128, 4096, torch.bfloat16, q) for q in (False, quantised))
    assert small.bytes < 0.56 * plain.bytes


def test_true_is_int8():
    assert lk.KVCache(1, 2, 64, 64, quantised=True).pages.key.dtype == torch.int8


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_the_ops_are_sound(quantised):
    cache, _, _ = filled([40, 20], quantised=quantised)
    pages = cache.pages
    fields = (pages.key, pages.value, pages.block_table, pages.length)
    scales = (pages.key_scale, pages.value_scale, pages.key_tail)
    rotation = LONG.rotation(torch.zeros(2, dtype=torch.int32))
    tables = [rotation.turns, rotation.base_turns, rotation.inv_freq, rotation.start_tokens]
    tables += [rotation.attention_factor, rotation.regime_index]
    numbers = (None, None, 0.125, True, -1, -1, 0.0, False, "")
    read = (queries(2), *fields, *scales, *tables, *numbers)
    # What looks for writes that the schema does not name multiplies every operand, and torch has no product of fp8.
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] * (quantised == "int8")
    torch.library.opcheck(torch.ops.longrope_kernels.attention_paged, read, test_utils=checks)
    key, value = tokens(3)
    appended = (key, value, *fields, *scales, torch.tensor([3, 1]), "")
    torch.library.opcheck(torch.ops.longrope_kernels.cache_append, appended, test_utils=checks)


def bad_pages(**changes):
    cache, _, _ = filled([100, 50], page_tokens=64, capacity=128)
    return dataclasses.replace(cache.pages, **changes)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({"block_table": torch.tensor([[0, 9], [1, 2]], dtype=torch.int32)}, r"block_table: got page 9 for tokens 64"),
        ({"block_table": torch.tensor([[0, -1], [1, 2]], dtype=torch.int32)}, r"block_table: got page -1"),
        ({"length": torch.tensor([129, 0])}, r"length: got 129, expected values in \[0, 128\]"),
        ({"length": torch.tensor([-1, 0])}, r"length: got -1"),
        ({"block_table": torch.zeros(2, 2)}, r"block_table: got torch.float32 \(2, 2\), expected torch.int32"),
        ({"key": torch.zeros(4, 2, 64, 64, dtype=torch.int8)}, r"value_pages: got torch.float32, expected torch.int8"),
        ({"key_scale": torch.zeros(1)}, r"key_scale: got a tensor beside torch.float32 pages"),
        ({"value": torch.zeros(4, 2, 32, 64)}, r"value_pages: got shape \(4, 2, 32, 64\), expected that of key_pages"),
    ],
)
def test_a_broken_cache_is_one_line_before_any_memory_is_touched(pages, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        lk.attention_paged(queries(1), bad_pages(**pages), PLAIN)
    assert "\n" not in str(caught.value)


def test_an_int8_cache_is_not_read_as_bf16():
    cache, _, _ = filled([100, 50], torch.bfloat16, quantised=True)
    with pytest.raises(ValueError, match="key_scale: got None beside int8 pages"):
        lk.attention_paged(
            queries(1, torch.bfloat16),
            dataclasses.replace(cache.pages, key_scale=None, value_scale=None, key_tail=None),
            PLAIN,
        )
    with pytest.raises(TypeError, match=r"key_tail: got torch.bfloat16, expected the dtype of query, torch.float32"):
        cache.attend(queries(1), PLAIN)
    stored = [x.view(torch.float8_e4m3fn) for x in (cache.pages.key, cache.pages.value)]
    pages = lk.Pages(*stored, cache.pages.block_table, cache.length)
    with pytest.raises(ValueError, match="key_scale: got None beside float8_e4m3fn pages"):
        lk.attention_paged(queries(1, torch.bfloat16), pages, PLAIN)


@pytest.mark.parametrize("page_tokens", [None, 64])
def test_a_full_cache_refuses_and_stays_as_it_was(page_tokens):
    cache, _, _ = filled([100, 100], page_tokens=page_tokens, capacity=128)
    expected = cache.attend(queries(1), PLAIN)
    with pytest.raises(ValueError, match="key: got 29 tokens for sequence 0, which has 100, expected at most 128"):
        cache.append(*tokens(29))
    assert cache.length.tolist() == [100, 100]
    assert torch.equal(cache.attend(queries(1), PLAIN), expected)


def test_a_pool_without_pages_refuses_and_keeps_those_it_has():
    cache = lk.KVCache(2, 2, 64, 256, torch.float32, page_tokens=64, pages=3)
    cache.append(*tokens(64))
    with pytest.raises(ValueError, match="key: got 2 more pages needed, expected at most the 1 that are free"):
        cache.append(*tokens(1))
    assert cache.free == [2]
    with pytest.raises(TypeError, match=r"key: got torch.float16, expected the dtype of the cache"):
        cache.append(*tokens(1, torch.float16), torch.tensor([1, 0]))
    assert cache.free == [2]
    cache.append(*tokens(1), torch.tensor([1, 0]))
    assert cache.length.tolist() == [65, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_tokens": 32, "quantised": True}, "page_tokens: got 32, expected a multiple of 64"),
        ({"pages": 4}, "pages: got 4, expected None without page_tokens"),
        ({"dtype": torch.int8}, r"dtype: got torch.int8, expected .*quantised=True"),
        ({"quantised": "fp4"}, r"quantised: got 'fp4', expected 'int8' \(or True\), 'fp8' or False"),
        ({"quantised": 1}, "quantised: got 1, expected 'int8'"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected an int >= 1"),
        ({"max_tokens": "a"}, "max_tokens: got 'a', expected an int >= 1"),
        ({"batch": 1.5}, "batch: got 1.5, expected an int >= 1"),
        ({"head_dim": 300}, r"head_dim: got 300, expected an int in \[1, 256\]"),
        ({"page_tokens": 64.0}, "page_tokens: got 64.0, expected an int >= 1"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lk.KVCache(**({"batch": 1, "key_heads": 2, "head_dim": 64, "max_tokens": 128} | options))


def test_bad_arguments_of_a_cache_are_named():
    cache = lk.KVCache(2, 2, 64, 256, torch.float32, page_tokens=64, pages=1)
    key, value = tokens(300)
    with pytest.raises(ValueError, match=r"sequence: got 'x', expected an int in \[0, 1\]"):
        cache.release("x")
    with pytest.raises(ValueError, match=r"key: got shape \(2, 300, 64\), expected \[batch, heads, tokens, head_dim\]"):
        cache.append(key[0], value[0])
    with pytest.raises(TypeError, match="count: got list, expected an integer tensor"):
        cache.append(key, value, [1, 1])
    assert cache.free == [0]
