"""Few rows over many keys: split keys, caches, packed batches, in the emulator."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longrope_kernels as lk
from longrope_kernels import functional, reference, testing
from longrope_kernels.backends import cuda
from longrope_kernels.bundles import KEY_GROUP, Packing

from . import build
from .test_kernels import DTYPES, EXAMPLES, operands

PLAIN = lk.RopeScaling(head_dim=64, theta=1e4)
HALF = lk.RopeScaling(64, 1e4, rotary_dim=32)
LONG = PLAIN.replace(rescale_factors=[1.0 + i / 8 for i in range(32)], start_tokens=5, attention_factor=1.1)
LADDER = lk.LongRope(100, {100: PLAIN, 4000: LONG})
KINDS = [(quantised, page) for quantised in (False, "int8", "fp8") for page in (None, 64)]


def filled(lengths, dtype, quantised, page_tokens, head_dim=64, capacity=1300):
    cache = lk.KVCache(len(lengths), 2, head_dim, capacity, dtype, quantised, page_tokens)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(len(lengths), 2, max(lengths), head_dim, generator=generator).to(dtype) for _ in range(2))
    cache.append(key, value, torch.tensor(lengths), backend="reference" if quantised == "fp8" else "cpu")
    return cache, key, value


def test_constants_are_those_of_python(emulated):
    assert emulated.KEY_GROUP == KEY_GROUP


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[200], [63, 1, 64, 65, 7], [1, 1, 130]])
def test_appending_leaves_the_bits_that_the_cpu_leaves(emulated, dtype, kind, cuts):
    other = "reference" if kind[0] == "fp8" else "cpu"
    generator = torch.Generator().manual_seed(0)
    caches = [lk.KVCache(2, 2, 40, 256, dtype, *kind) for _ in range(2)]
    for cut in cuts:
        key, value = (torch.randn(2, 2, cut, 40, generator=generator).to(dtype) for _ in range(2))
        key[0, 0, 0, 0] = 0.0
        for cache, backend in zip(caches, ("cuda", other), strict=True):
            cache.append(key, value, torch.tensor([cut, cut // 2]), backend=backend)
    for name in ("key", "value", "key_scale", "value_scale", "key_tail", "length"):
        ours, theirs = (getattr(cache.pages, name) for cache in caches)
        assert ours is None or testing.same_bits(ours, theirs), name


@pytest.mark.parametrize("quantised", [False, "int8", "fp8"])
@pytest.mark.parametrize(("held", "told", "taken"), [(10, 100, 70), (100, 50, 28)], ids=["tokens", "room"])
def test_an_append_ends_with_its_tokens_and_its_room(emulated, quantised, held, told, taken):
    """Straight to the backend: on a GPU the host sees no counts to check."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 170, 64, generator=generator).half()
    caches = [lk.KVCache(1, 2, 64, 128, torch.float16, quantised, 64) for _ in range(2)]
    for cache, count in zip(caches, (told, taken), strict=True):
        cache.append(key[:, :, :held], value[:, :, :held], backend="cuda")
        behind = [x[:, :, held : held + 70] for x in (key, value)]
        pages = dataclasses.replace(cache.pages, block_table=torch.tensor([[0, 1]], dtype=torch.int32))
        cuda.cache_append(*behind, pages, torch.tensor([count]))
    for name in ("key", "value", "key_scale", "value_scale", "key_tail"):
        ours, exact = (getattr(cache.pages, name) for cache in caches)
        assert ours is None or testing.same_bits(ours, exact), name


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_what_is_not_finite_poisons_its_scale(emulated, quantised):
    key, value = (torch.ones(1, 1, 64, 32, dtype=torch.float16) for _ in range(2))
    key[0, 0, 3, 5], value[0, 0, 7, 0] = torch.inf, torch.nan
    cache = lk.KVCache(1, 1, 32, 64, torch.float16, quantised)
    cache.append(key, value, backend="cuda")
    assert cache.pages.key_scale[0, 0, 0].isnan().nonzero().flatten().tolist() == [5]
    assert cache.pages.value_scale[0, 0].isnan().nonzero().flatten().tolist() == [7]
    assert cache.attend(torch.ones(1, 1, 1, 32, dtype=torch.float16), backend="cuda").isnan().all()


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_make_their_rows_not_a_number(emulated, queries, bad):
    problem = testing.Problem(*operands(1, (4, 2), (queries, 600)), PLAIN, {"backend": "cuda"})
    testing.check_bad_query(lk.attention, problem, bad)


def test_fp8_conversions_are_those_of_torch(emulated):
    """Every code, and on the way back every code, every middle between two, and their neighbours in fp32."""
    exact = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    wide = torch.tensor([emulated.widen_fp8(code) for code in range(256)])
    assert torch.equal(wide.isnan(), exact.isnan())
    assert torch.equal(wide.nan_to_num(), exact.nan_to_num())
    steps = exact[exact.isfinite()].sort().values
    points = torch.cat((exact, (steps[1:] + steps[:-1]) / 2, torch.tensor([1e-30, 1e-44, 500.0, 3e38, torch.inf])))
    points = torch.cat([x for y in (points, -points) for x in (y, y.nextafter(y + 1), y.nextafter(y - 1))])
    expected = points.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for value, code in zip(points.tolist(), expected.tolist(), strict=True):
        assert emulated.narrow_fp8(value) == (127 if value != value else code), value


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_small_probabilities_of_quantised_values_count(emulated, quantised):
    """1,200 keys far below the largest score, in fp16: a probability times a scale is below its normals."""
    key = torch.zeros(1, 1, 1201, 32, dtype=torch.float16)
    key[0, 0, 0, 0] = 1.0
    value = torch.ones_like(key)
    value[0, 0, 0] = 0.0
    cache = lk.KVCache(1, 1, 32, 1201, torch.float16, quantised)
    cache.append(key, value, backend="cuda")
    query = torch.zeros(1, 1, 1, 32, dtype=torch.float16)
    query[..., 0] = 11.0
    out, exact = (cache.attend(query, scale=1.0, backend=backend) for backend in ("cuda", "reference"))
    assert exact.min() > 0.01
    assert torch.allclose(out, exact, rtol=3e-3)


@pytest.mark.parametrize("window", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_more_partial_results_than_a_block_looks_at_once(emulated, window):
    """Of 300 runs of keys, with a window of which the last alone is seen."""
    query, key, value = operands(1, (2, 1), (1, 300 * emulated.SPLIT_KEYS - 7), 32, torch.float16)
    scaling = lk.RopeScaling(32, 1e4)
    out, exact = (
        lk.attention(query, key, value, scaling, return_lse=True, window=window, backend=backend)
        for backend in ("cuda", "cpu")
    )
    for x, y in zip(out, exact, strict=True):
        assert torch.allclose(x.float(), y.float(), rtol=2e-3, atol=2e-3 * float(y.abs().max()))


@pytest.mark.parametrize("stored", [False, "int8"])
@pytest.mark.parametrize("of", ["key_pages", "value_pages"])
def test_a_cache_whose_rows_the_kernels_cannot_read_is_refused(emulated, stored, of):
    cache, key, value = filled([60], torch.float16, stored, 64, capacity=64)
    field = of.removesuffix("_pages")
    aligned = getattr(cache.pages, field)
    room = torch.zeros(aligned.numel() + 4, dtype=aligned.dtype)
    pages = dataclasses.replace(cache.pages, **{field: room[4:].view(aligned.shape)})
    with pytest.raises(ValueError, match=f"{of}: got address .* expected rows at multiples of"):
        lk.attention_paged(key[:, :, :1], pages, PLAIN, backend="cuda")
    with pytest.raises(ValueError, match=f"{of}: got address"):
        lk.cache_append(key[:, :, :1], value[:, :, :1], pages, backend="cuda")


def check_cache(dtype, head_dim, lengths, kind, query_heads, query_tokens, interleaved, rotary_dim):
    cache, _, _ = filled(lengths, dtype, *kind, head_dim=head_dim)
    scaling = lk.RopeScaling(head_dim, 1e4, [2.0] * (rotary_dim // 2), 7, 1.1, rotary_dim, interleaved)
    query = operands(len(lengths), (query_heads, 2), (query_tokens, 1), head_dim, dtype, seed=9)[0]
    testing.check_reading(cache, query, scaling, "cuda")


def test_every_kind_of_cache_obeys_the_error_rule(emulated):
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(
        st.sampled_from(DTYPES),
        st.sampled_from([40, 64, 80, 96, 128, 256]),
        st.lists(st.integers(1, 700), min_size=1, max_size=3),
        st.sampled_from(KINDS),
        st.sampled_from([8, 48]),
        st.sampled_from([1, 2, 4, 5, 21]),
        st.booleans(),
        st.sampled_from([0.0, 0.5, 1.0]),
    )
    def holds(dtype, head_dim, lengths, kind, query_heads, query_tokens, interleaved, share):
        rotary_dim = int(head_dim * share) // 2 * 2
        check_cache(dtype, head_dim, lengths, kind, query_heads, query_tokens, interleaved, max(rotary_dim, 2))

    holds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("query_heads", "query_tokens"), [(40, 2), (16, 3)], ids=["a group of 20", "speculated"])
def test_more_rows_than_a_block_has_obey_the_error_rule(emulated, kind, head_dim, query_heads, query_tokens):
    """Each token sees a key more than the one before, in the same block of rows and in others."""
    check_cache(torch.bfloat16, head_dim, [600, 66, 5], kind, query_heads, query_tokens, head_dim == 128, head_dim)


@pytest.mark.parametrize(("query_heads", "query_tokens"), [(32, 1), (8, 16), (2, 64), (16, 3)])
def test_keys_are_split_up_to_a_number_of_rows(emulated, query_heads, query_tokens):
    """Blocks of 16 rows and 512 keys, and one a row that adds up; past that number the blockwise kernels."""
    splits, rows = 3, query_heads // 2 * query_tokens
    operands_of = [operands(1, (query_heads, 2), (x, 3 * emulated.SPLIT_KEYS - 100)) for x in (query_tokens, 65)]
    assert rows <= emulated.DECODE_ROWS < query_heads // 2 * 65
    for (q, k, v), count in zip(operands_of, (rows, query_heads // 2 * 65), strict=True):
        emulated.take_counters()
        lk.attention(q, k, v, PLAIN, backend="cuda")
        split = 2 * (-(-count // 16) * splits + count)
        assert (emulated.take_counters()["blocks"] == split) is (count == rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 15.0}], ids=["causal", "window", "softcap"])
def test_a_row_gives_the_bits_it_gives_with_fewer_beside_it(emulated, kind, options):
    """The last tokens, and the heads of half a group: other rows share their blocks, of other keys."""
    cache, _, _ = filled([600, 77], torch.bfloat16, *kind)
    query = operands(2, (24, 2), (5, 1))[0]
    whole, last = (
        cache.attend(x, LADDER, return_lse=True, backend="cuda", **options) for x in (query, query[:, :, -2:])
    )
    assert all(torch.equal(x[:, :, -2:], y) for x, y in zip(whole, last, strict=True))
    half = query.view(2, 2, 12, 5, 64)[:, :, :6].reshape(2, 12, 5, 64)
    of_half = cache.attend(half, LADDER, backend="cuda", **options)
    assert torch.equal(whole[0].view(2, 2, 12, 5, 64)[:, :, :6].reshape(2, 12, 5, 64), of_half)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [None, 7, 64])
@pytest.mark.parametrize("query_tokens", [1, 4, 30])
def test_reading_a_cache_gives_the_bits_of_attention_over_its_keys(emulated, dtype, page_tokens, query_tokens):
    lengths = [600, 77]
    cache, key, value = filled(lengths, dtype, False, page_tokens)
    query = operands(2, (8, 2), (query_tokens, 1), dtype=dtype)[0]
    out, lse = cache.attend(query, LADDER, return_lse=True, window=400, backend="cuda")
    expected = lk.attention(
        query, key, value, LADDER, key_length=torch.tensor(lengths), return_lse=True, window=400, backend="cuda"
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_packed_sequence_gives_the_bits_it_gives_alone(emulated, is_causal):
    query_lengths, key_lengths = [3, 60, 0, 1, 20], [700, 60, 4, 1, 90]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16()
        for lengths, heads in ((query_lengths, 4), (key_lengths, 2), (key_lengths, 2))
    )
    bounds = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    options = {"is_causal": is_causal, "window": 500, "softcap": 20.0, "return_lse": True, "backend": "cuda"}
    out, lse = lk.attention_varlen(q, k, v, *bounds, LADDER, **options)
    for b, count in enumerate(query_lengths):
        rows, slots = (slice(int(x[b]), int(x[b + 1])) for x in bounds)
        if count == 0:
            continue
        alone = [x[part].transpose(0, 1).unsqueeze(0) for x, part in ((q, rows), (k, slots), (v, slots))]
        one, one_lse = lk.attention(*alone, LADDER, **options)
        assert torch.equal(out[rows], one[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], one_lse[0])


@pytest.mark.parametrize("fixture", ["emulated", "hopper"])
@pytest.mark.parametrize("of", ["queries", "keys"])
@pytest.mark.parametrize("bounds", [[0, 40, 1000], [-5, 40, 130], [0, 900, 130], [0, 2**40, 2**41], [0, 100, 40, 130]])
def test_a_packed_batch_ends_with_its_operands(request, fixture, of, bounds):
    """Straight to the backend: on a GPU the host sees no bounds to check."""
    request.getfixturevalue(fixture)
    q, k, v, weight = torch.randn(4, 130, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    batched = (x.transpose(0, 1).expand(len(bounds) - 1, -1, -1, -1) for x in (q, k, v))
    rotation, geometry = functional.bundle(*batched, PLAIN)
    inside = torch.tensor([0, 100, 130] if len(bounds) == 3 else [0, 20, 110, 130])
    told, kept = torch.tensor(bounds), torch.tensor(bounds).clamp(0, 130).cummax(0).values

    def results(bounds):
        packing = Packing(bounds, inside) if of == "queries" else Packing(inside, bounds)
        out, lse = cuda.attention_varlen(q, k, v, rotation, geometry, packing)
        grads = cuda.attention_varlen_backward(
            weight, None, q, k, v, out, lse, rotation, geometry, packing, want_inv_freq=True
        )
        return (out, lse, *grads)

    assert all(torch.equal(x, y) for x, y in zip(results(told), results(kept), strict=True))


def test_the_longest_sequence_of_a_batch_changes_no_bit_of_the_others(emulated):
    """Splits are counted from a sequence's first key, and those it does not have are skipped."""
    q, k, v = operands(2, (8, 2), (1, 1300))
    length = torch.tensor([520, 1300])
    together = lk.attention(q, k, v, LADDER, key_length=length, backend="cuda")
    alone = lk.attention(q[:1], k[:1, :, :520], v[:1, :, :520], LADDER, backend="cuda")
    assert torch.equal(together[:1], alone)


def test_one_product_of_angles_is_within_its_bound(emulated):
    """The angle of a key, from that of the middle of 16 and its distance, beside the exact one."""
    generator = torch.Generator().manual_seed(0)
    turns = [int(x) for x in torch.randint(-(2**63), 2**63 - 1, (4000,), generator=generator).numpy().view("uint64")]
    firsts = [int(x) * 16 for x in torch.randint(0, 2**27, (4000,), generator=generator)]
    worst = 0.0
    for i, (frequency, first) in enumerate(zip(turns, firsts, strict=True)):
        angles = emulated.angles_of_16_keys(first, frequency)
        key = i % 16
        turn = ((first + key) * frequency) % 2**64 / 2**64
        exact = (math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn))
        worst = max(worst, *(abs(x - y) for x, y in zip(angles[key], exact, strict=True)))
    assert 5e-8 < worst < 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [64, 32, 18])
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_that_are_given_change_little(emulated, dtype, rotary_dim, interleaved):
    """Their angles are exact one by one; those of the index are products. Keys differ by a rounding here and there."""
    scaling = lk.RopeScaling(64, 1e4, [3.0] * (rotary_dim // 2), 70, 1.2, rotary_dim, interleaved)
    q, k, v = operands(1, (4, 2), (2, 300), dtype=dtype)
    out = lk.attention(q, k, v, scaling, backend="cuda")
    given = lk.attention(q, k, v, scaling, key_positions=torch.arange(300), backend="cuda")
    assert torch.allclose(out, given, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [(False, None), (False, 16), ("int8", None), ("fp8", 64)])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 256])
def test_far_below_and_across_start_tokens(emulated, kind, head_dim):
    """n-hat in the first tile, in a later one, at a tile's end, and past the keys."""
    cache, _, _ = filled([200, 64], torch.bfloat16, *kind, head_dim=head_dim)
    base = lk.RopeScaling(head_dim, 1e4)
    for start_tokens in (7, 100, 128, 1000):
        scaling = base.replace(rescale_factors=[2.0] * (head_dim // 2), start_tokens=start_tokens)
        query = operands(2, (4, 2), (2, 1), head_dim, seed=3)[0]
        testing.check_reading(cache, query, scaling, "cuda")


def root_mean_square(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved"), [(64, 64, True), (128, 128, False), (128, 64, False)]
)
def test_reading_errs_on_average_no_more_than_plain_arithmetic(
    emulated, quantised, dtype, head_dim, rotary_dim, interleaved
):
    cache, _, _ = filled([1152, 320], dtype, quantised, 64, head_dim)
    scaling = lk.RopeScaling(head_dim, 1e4, [3.0] * (rotary_dim // 2), 64, 1.2, rotary_dim, interleaved)
    query = 2 * operands(2, (16, 2), (3, 1), head_dim, dtype, seed=5)[0]
    out, lse = cache.attend(query, scaling, return_lse=True, backend="cuda")
    key, value = testing.gathered(cache.pages, torch.float64)
    rules = {"key_length": cache.length}
    exact, exact_lse = reference.attention(query, key, value, scaling, return_lse=True, **rules)
    rounded = testing.Problem(query, key.to(dtype), value.to(dtype), scaling, rules)
    plain, plain_lse = testing.plain_attention(rounded)
    assert root_mean_square(out - exact) < 1.1 * root_mean_square(plain - exact)
    assert root_mean_square(lse - exact_lse) < 1.1 * root_mean_square(plain_lse - exact_lse)


# By what channels, tokens and queries of a cache are larger; keys are 256 in four groups, pairs dims i and i + 32. Of
# half a head they are i and i + 16, and the kernel puts 32 + i and 48 + i beside each other.
CHANNELS, GROUPS = torch.arange(64), torch.arange(256).view(-1, 1) // 64
APART = (CHANNELS >= 32) * ((CHANNELS + CHANNELS // 16) % 2) * 14
SIZES = {
    "keys large": (torch.tensor(2.0**90), 1.0, 2.0**-90),
    "keys small": (torch.tensor(2.0**-90), 1.0, 2.0**90),
    "keys past the units": (torch.tensor(2.0**-110), 1.0, 2.0**110),
    "pairs far apart": (2.0 ** (CHANNELS % 32 - 16), 1.0, 2.0 ** (16 - CHANNELS % 32)),
    "channels of a pair apart": (2.0 ** (CHANNELS % 3 * 4), 1.0, 2.0**-4),
    "channels of a pair far apart": (2.0 ** (CHANNELS // 32 * 14), 1.0, 2.0 ** (CHANNELS // 32 * -14)),
    "channels that do not rotate far apart": (2.0**APART, 1.0, 2.0**-APART),
    "groups apart": (2.0 ** (GROUPS * 2), 1.0, 2.0**-4),
    "groups far apart": (2.0 ** (GROUPS * 8), 1.0, 2.0**-22),
    "channels of zeros": ((CHANNELS % 5 > 0).float(), 1.0, 1.0),
    "keys of zeros": (torch.tensor(0.0), 1.0, 1.0),
    "values large": (torch.tensor(1.0), torch.tensor(2.0**100), 1.0),
    "values small": (torch.tensor(1.0), torch.tensor(2.0**-90), 1.0),
    "values past the unit": (torch.tensor(1.0), torch.tensor(2.0**-115), 1.0),
    "values far apart": (torch.tensor(1.0), 2.0 ** (GROUPS * -10), 1.0),
    "values of zeros": (torch.tensor(1.0), torch.tensor(0.0), 1.0),
}


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("name", SIZES)
def test_keys_and_values_of_any_size_obey_the_error_rule(emulated, quantised, name):
    """Of bf16, with fp16 inside: its range is none of the caller's business."""
    of_keys, of_values, of_query = SIZES[name]
    query, key, value = (x.float() for x in operands(1, (16, 2), (4, 256), 64))
    key, value, query = ((x * y).bfloat16() for x, y in ((key, of_keys), (value, of_values), (query, of_query)))
    assert all(x.isfinite().all() for x in (query, key, value))
    cache = lk.KVCache(1, 2, 64, 256, torch.bfloat16, quantised, 64)
    cache.append(key, value, backend="cuda")
    # Where dims turn into one another, sizes that undo each other do not: scores would be as large as the keys.
    scaling = HALF if "do not rotate" in name else PLAIN
    for interleaved in (False, True):
        testing.check_reading(cache, query, scaling.replace(interleaved=interleaved), "cuda")


def with_large_values_that_weigh_nothing(quantised):
    """A cache and queries that see its first group with weights below 2^-100, whose values are 2^40 the others'."""
    query, key, value = operands(1, (16, 2), (4, 256), 64)
    query[..., 63], key[..., 63] = 300.0, torch.where(GROUPS[:, 0] > 0, 1.0, -1.0).bfloat16()
    cache = lk.KVCache(1, 2, 64, 256, torch.bfloat16, quantised, 64)
    cache.append(key, value * torch.where(GROUPS > 0, 1.0, 2.0**40).bfloat16(), backend="cuda")
    return cache, query


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_values_beside_larger_ones_that_weigh_nothing(emulated, quantised):
    testing.check_reading(*with_large_values_that_weigh_nothing(quantised), PLAIN, "cuda")


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_scales_may_be_negative(emulated, quantised):
    query, key, value = operands(1, (16, 2), (4, 256), 64)
    cache = lk.KVCache(1, 2, 64, 256, torch.bfloat16, quantised, 64)
    cache.append(key * 2.0**12, value * 2.0**12, backend="cuda")
    for scales in (cache.pages.key_scale, cache.pages.value_scale):
        scales.neg_()
    testing.check_reading(cache, query * 2.0**-12, PLAIN, "cuda")


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("large", [2.0**29, 2.0**40, 2.0**90, torch.finfo(torch.bfloat16).max])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_large_element_of_a_query_may_mask_keys(emulated, quantised, large, interleaved):
    """The keys that are left have 0 there: what counts is the others' scores, beside which fp16 has no such number."""
    query, key, value = operands(1, (16, 2), (4, 256), 64)
    query[:, 3:5, :, 63], key[..., 63] = large, torch.where(torch.arange(256) % 4 == 0, 0.0, -1.0).bfloat16()
    cache = lk.KVCache(1, 2, 64, 256, torch.bfloat16, quantised, 64)
    cache.append(key, value, backend="cuda")
    testing.check_reading(cache, query, HALF.replace(interleaved=interleaved), "cuda")


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_changes_no_bit_of_the_others_of_its_block(emulated, quantised, bad):
    problem = testing.Problem(*operands(1, (16, 2), (4, 256), 64), PLAIN, {"backend": "cuda"})
    cache = lk.KVCache(1, 2, 64, 256, torch.bfloat16, quantised, 64)
    cache.append(problem.key, problem.value, backend="cuda")
    testing.check_bad_query(
        lambda query, _, __, scaling, **kwargs: cache.attend(query, scaling, **kwargs), problem, bad
    )


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("large", [2.0**30, float("nan")])
def test_values_that_no_row_of_a_block_sees_change_no_bit_of_it(emulated, quantised, large):
    """The run's values are multiplied in fp16 or not, as the largest of them allows; of 16 heads a token is a block."""
    query, key, value = operands(1, (16, 1), (2, 256), 64)
    results = []
    for factor in (1.0, large):
        value[:, :, 255] *= factor
        cache = lk.KVCache(1, 1, 64, 256, torch.bfloat16, quantised, 64)
        cache.append(key, value, backend="cuda")
        results.append(cache.attend(query, PLAIN, backend="cuda"))
    assert not testing.same_bits(*(x[:, :, 1] for x in results))
    assert testing.same_bits(*(x[:, :, 0] for x in results))


@pytest.mark.parametrize("page_tokens", [1, 3, 16, 24, 64, 100])
def test_pages_of_any_size_give_the_same_bits(emulated, page_tokens):
    query = operands(2, (8, 2), (3, 1))[0]
    whole, paged = (filled([600, 77], torch.bfloat16, False, x)[0] for x in (None, page_tokens))
    assert torch.equal(*(x.attend(query, LADDER, window=300, softcap=15.0, backend="cuda") for x in (whole, paged)))


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_a_value_is_widened_as_it_is(emulated, dtype, quantised):
    """One key a sequence, of which out is the value: every code in every column."""
    cache = lk.KVCache(256, 1, 64, 64, dtype, quantised)
    ones = torch.ones(256, 1, 64, 64, dtype=dtype)
    cache.append(ones, ones, backend="cpu" if quantised == "int8" else "reference")
    codes = (torch.arange(256).view(-1, 1, 1, 1) + torch.arange(64)).expand(256, 1, 64, 64) % 256
    stored = codes.to(torch.uint8).view(cache.pages.value.dtype)
    cache.pages.value.copy_(stored)
    cache.pages.value_scale.fill_(1.0)
    out = cache.attend(ones[:, :, :1], is_causal=False, backend="cuda")
    assert torch.equal(out.nan_to_num(7.0)[:, 0, 0], stored[:, 0, 0].to(dtype).nan_to_num(7.0))


# What, in its place, and what the look at it says: of keys rotated in fp16, their scales and their units.
PACKED, ATTENTION, TILES = (f"cuda/sm80/{x}.cuh" for x in ("decode_packed", "attention_decode", "decode_tiles"))
PLANTED = {
    "no wait for the scales": (ATTENTION, "copy_async_wait<1>();", "", "in flight"),
    "no barrier after it": (ATTENTION, "block_sync();  // the scales are there", "// ", "race|in flight|nothing wrote"),
    "no barrier for the extremes": (PACKED, "block_sync();\n    values = {};", "values = {};", "race|nothing"),
    "one place for the middles of all tiles": (PACKED, "S::kMiddles + stage *", "S::kMiddles + 0 * stage *", "race"),
    "the middle of a tile one key further on": (PACKED, "+ S::kKeys - 1, half", "+ S::kKeys + 1, half", "wrong"),
    "distances that start at the middle": (PACKED, "2 * kOf * part + 1", "2 * kOf * part", "wrong"),
    "the scales of the run's first group": (ATTENTION, "first % kSplitKeys / kKeyGroup;", "0 * first;", "wrong"),
    "queries without their pairs' units": (PACKED, "? unit * regime.factor : unit", "? regime.factor : 1.0f", "wrong"),
    "no attention factor": (PACKED, "? unit * regime.factor : unit", "? unit : unit", "wrong"),
    "scores without their rows' units": (PACKED, "[2 * r + c] *= unit", "[2 * r + c] *= 1.0f", "wrong"),
    "sums without their values' unit": (ATTENTION, "* value_unit);", ");", "wrong"),
    "keys in fp16 whatever their scales": (PACKED, "keys && in_range(of.least, of.most, 0x1p10f)", "keys", "wrong"),
    "values in fp16 whatever their scales": (PACKED, "S::kPacked ? 0x1p20f : infinity()", "infinity()", "wrong"),
    "values in bf16 without their sign": ("cuda/rows.cuh", "(low & 0x00800080u) | 0x43004300u", "0x43004300u", "wrong"),
    "bytes as they are": ("cuda/rows.cuh", "bytes ^ 0x80808080u;\n#pragma", "bytes;\n#pragma", "wrong"),
    "second dims turned alone": (PACKED, "multiply_halves(a, angle.sin)", "multiply_halves(b, angle.sin)", "wrong"),
    "the tail among the whole groups": (TILES, "whole_ || tail ||", "whole_ ||", "wrong|out of bounds|nothing"),
    "a page for two tiles": (TILES, "kStep = kOfTile ? S::kKeys", "kStep = kOfTile ? S::kKeys / 2", "wrong"),
}  # fmt: skip


def told(module, monkeypatch):
    """What the emulator, or the error rule, says of a module's reading of int8 caches."""
    monkeypatch.setattr(cuda, "_native", module)
    long = PLAIN.replace(rescale_factors=[2.0] * 32, start_tokens=64, attention_factor=1.3)
    try:
        for seed in range(2):
            module.seed(seed)
            for name, scaling in (("groups apart", long), ("channels that do not rotate far apart", HALF)):
                of_keys, of_values, of_query = SIZES[name]
                query, key, value = (x.float() for x in operands(1, (16, 2), (4, 256), 64))
                whole = [(key * of_keys).bfloat16(), (value * of_values).bfloat16()]
                cache = lk.KVCache(1, 2, 64, 320, torch.bfloat16, "int8", 64)
                cache.append(*whole, backend="cpu")
                cache.append(*(x[:, :, :7] for x in whole), backend="cpu")
                testing.check_reading(cache, (query * of_query).bfloat16(), scaling, "cuda")
            testing.check_reading(*with_large_values_that_weigh_nothing("int8"), PLAIN, "cuda")
    except AssertionError as error:
        return f"wrong: {error}"
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_the_same_look_at_sound_sources_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch) == "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_planted_in_the_packed_keys_is_caught(emulator, monkeypatch, name):
    path, old, new, expected = PLANTED[name]
    text = (build.CSRC / path).read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} of {old!r}"
    source = "cuda/sm80/attention_decode.cuh"
    changes = {source: (build.CSRC / source).read_text()} | {path: text.replace(old, new)}
    # One head_dim is enough to show a mistake, and compiles sooner.
    lines = [x for x in changes[source].splitlines() if not re.search(r" run\w*<T, (?!64\b)\d", x)]
    said = told(build.module(changes | {source: "\n".join(lines) + "\n"}), monkeypatch)
    assert re.search(expected, said), said
