"""The backward kernels for Hopper in the emulator: conformance, what only they could get wrong, planted bugs."""

import re

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends import cuda

from . import build
from .test_hopper_forward import packed, scaling
from .test_kernels import DTYPES, EXAMPLES, operands

BACKWARD, WIDE = "cuda/sm90/attention_backward.cu", "cuda/sm90/attention_backward_wide.cu"
QUERY, KEY = "cuda/sm90/query_gradient.cuh", "cuda/sm90/key_gradient.cuh"
SHARED = ["cuda/sm90/backward.cuh", "cuda/sm90/gradients.cuh", "cuda/sm90/pipeline.cuh"]


def gradients(operands, weight, *arguments, backend="cuda", attention=lk.attention, **options):
    """Of queries, keys and values through out and lse."""
    leaves = [x.detach().requires_grad_() for x in operands]
    out, lse = attention(*leaves, *arguments, return_lse=True, backend=backend, **options)
    return torch.autograd.grad((out * weight).float().sum() + lse[lse.isfinite()].sin().sum(), leaves)


def weight_like(x, seed=9):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_kernels_conform(hopper, seed):
    hopper.seed(seed)
    testing.conformance(
        backend="cuda",
        dtypes=DTYPES,
        head_dims=[x for x in testing.HEAD_DIMS if x <= 128],
        max_tokens=300,
        max_examples=max(EXAMPLES // 2, 1),
    )


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"window": 33}, {"softcap": 3.0}], ids=str)
def test_gradients_are_those_of_the_reference(hopper, head_dim, options):
    """Several blocks, the last of which is not whole, and more keys than queries; two sequences where that is quick."""
    q, k, v = operands(2 if head_dim == 64 else 1, (4, 2), (200, 330), head_dim)
    results = [
        gradients((q, k, v), weight_like(q), scaling(head_dim), backend=x, **options) for x in ("cuda", "reference")
    ]
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_neighbour_of_nan_is_not_seen(hopper):
    """A bulk copy of the last tile brings the next sequence's rows too: 0 x NaN must not come of it."""
    (q, k, v), bounds = packed([170, 60])
    weight = weight_like(q)

    def first():
        grads = gradients((q, k, v), weight, bounds, bounds, scaling(), attention=lk.attention_varlen)
        return [x[:170] for x in grads]

    wanted = first()
    for x in (q, k, v, weight):
        x[170:] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(first(), wanted, strict=True))


@pytest.mark.parametrize("window", [None, 33])
def test_queries_that_see_nothing_have_no_gradient(hopper, window):
    """More queries than keys: the first see none, and have an lse of -inf."""
    q, k, v = operands(heads=(2, 1), tokens=(200, 60))
    results = [gradients((q, k, v), weight_like(q), scaling(), window=window, backend=x) for x in ("cuda", "reference")]
    assert torch.equal(results[0][0][:, :, :140], torch.zeros(1, 2, 140, 64, dtype=q.dtype))
    for actual, exact in zip(*results, strict=True):
        assert (actual - exact).abs().max() < 0.02 * exact.abs().max()


def test_keys_that_nothing_sees_have_no_gradient(hopper):
    q, k, v = operands(heads=(2, 1), tokens=(20, 300))
    _, d_key, d_value = gradients((q, k, v), weight_like(q), scaling(), window=10)
    for x in (d_key, d_value):
        assert torch.equal(x[:, :, :271], torch.zeros_like(x[:, :, :271]))
        assert x[:, :, 271:].abs().amin((0, 1, 3)).max() > 0


def test_expanded_operands(hopper):
    """Tokens, heads and sequences that are the same memory, of values and of the gradient that comes in."""
    q, k, v = operands(2, heads=(4, 2), tokens=(64, 64))
    for expanded in (v[:1, :1].expand_as(v), v[:, :, :1].expand_as(v)):
        one = weight_like(q)[:1, :1, :1].expand_as(q)
        got = gradients((q, k, expanded), one, scaling())
        wanted = gradients((q, k, expanded.clone()), one.clone(), scaling())
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_products_are_those_of_the_visible_tiles(hopper):
    """Three products for dq in tiles of 128 keys, four for dk and dv in tiles of 128 rows."""
    tokens, head_dim, tile = 512, 64, 128
    q, k, v = operands(heads=(1, 1), tokens=(tokens, tokens))
    hopper.take_counters()
    gradients((q, k, v), weight_like(q), scaling(head_dim))
    blocks = tokens // tile
    tiles = blocks * (blocks + 1) // 2
    product = tile * tile * head_dim // (16 * 8 * 16)
    assert hopper.take_counters()["products"] == tiles * (2 + 7) * product


# (what stands there, what is put there, the how-manieth, what must be said)
PLANTED = {
    "dq: no wait for queries and grad_out": ("rows.wait_full(blocks);", "", 0, "in flight|nothing wrote|race"),
    "dq: no wait for the first keys": ("keys.wait_full(count);", "", 0, "in flight|nothing wrote|race"),
    "dq: no wait for the keys": ("keys.wait_full(count);", "", 1, "in flight|nothing wrote|race"),
    "dq: no wait for the values": ("values.wait_full(at * S::kSlabs + slab);", "", 0, "in flight|nothing wrote|race"),
    "dq: keys copied over what is read": ("keys.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "dq: values copied over what is read": ("values.wait_free(slab);", "", 0, "race|in flight|one arrival too many"),
    "dq: queries copied over what is read": ("rows.wait_free(blocks);", "", 0, "race|in flight|one arrival too many"),
    "dq: keys released before the product with them": (
        "group_wait<S::kSlabs>(out, packed);\n                keys.release(count - 1);",
        "keys.release(count - 1);\n                group_wait<S::kSlabs>(out, packed);",
        0,
        "race",
    ),
    "dq: values released before the product with them": (
        "group_wait<kCount - 1 - kNext + kAfter>();",
        "group_wait<kCount - kNext + kAfter>();",
        0,
        "race",
    ),
    "dq: dS packed over what is multiplied": (
        "group_wait<S::kSlabs>(out, packed);",
        "",
        0,
        "in flight|race|wgmma without a fence",
    ),
    "dq: a wait that leaves a product in flight": (
        "group_wait<S::kSlabs>(out, packed)",
        "group_wait<S::kSlabs + 1>(out, packed)",
        0,
        "leaves in flight",
    ),
    "dq: no wgmma fence before the values": ("group_fence();", "", 0, "wgmma without a fence"),
    "dq: no wgmma fence": ("group_fence();", "", 1, "wgmma without a fence"),
    "dq: no wgmma fence after the wait": ("group_fence();", "", 2, "wgmma without a fence"),
    "dq: no wgmma fence at the end": ("group_fence();", "", 3, "wgmma without a fence"),
    "dq: turns that are not given": (
        "give_turn(group);\n                release_multiplied",
        "release_multiplied",
        1,
        "no thread can go on",
    ),
    "dq: sums written while grad_out is read": (
        "group_sync(group);  // no warp of the group reads grad",
        "// ",
        0,
        "race",
    ),
    "dq: no proxy fence after the sums": (
        "proxy_fence();\n        rows.release",
        "rows.release",
        0,
        "without a proxy fence",
    ),
    "dq: no proxy fence after the last keys": (
        "copy_async_wait<0>();\n        proxy_fence();",
        "copy_async_wait<0>();",
        0,
        "without a proxy fence",
    ),
    "no wait for the last tile's copy": (
        "copy_async_wait<0>();",
        "",
        0,
        "in flight|without a proxy fence|nothing wrote",
    ),
    "dq: no proxy fence after the mbarriers": (
        "begin();\n        proxy_fence();",
        "begin();",
        0,
        "without a proxy fence",
    ),
    "dq: no barrier after the mbarriers": ("block_sync();", "", 0, "race|nothing wrote"),
    "dq: too few bytes expected": (
        "mbarrier_expect(full(count), TileT::kBytes)",
        "mbarrier_expect(full(count), TileT::kBytes - 1024)",
        0,
        "no thread can go on|in flight|one arrival",
    ),
    "dq: no turn before what is known of the rows is read": (
        "wait_for_turn(group);\n                multiply_values",
        "multiply_values",
        0,
        "race|nothing wrote|arrives twice at barrier",
    ),
    "dq: a tail one row too long": ("if (left < S::kKeys) {", "if (left + 1 < S::kKeys) {", 0, "wrong result"),
    "dq: a mask one key too wide": ("mask(first, slopes)", "mask(first - 1, slopes)", 0, "wrong result"),
    "tiles that are seen but for one column": ("high >= 8 * kTiles", "high + 1 >= 8 * kTiles", 0, "wrong result"),
    "dq: keys along the wrong dimension": (
        "keys.tile(at).by_rows()",
        "keys.tile(at).by_columns()",
        0,
        "wrong result|nothing wrote|race|out of bounds",
    ),
    "dk: no wait for keys and values": ("own.wait_full(blocks);", "", 0, "in flight|nothing wrote|race"),
    "dk: no wait for the first queries": ("rows.wait_full(count);", "", 0, "in flight|nothing wrote|race"),
    "dk: no wait for the queries": ("rows.wait_full(count);", "", 1, "in flight|nothing wrote|race"),
    "dk: queries copied over what is read": ("rows.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "dk: keys copied over what is read": ("keys.wait_free(blocks);", "", 0, "race|in flight|one arrival too many"),
    "dk: queries released before the product with them": (
        "group_wait<1>(d_keys, packed);\n                rows.release(count - 1);",
        "rows.release(count - 1);\n                group_wait<1>(d_keys, packed);",
        0,
        "race",
    ),
    "dk: a wait that leaves a product in flight": (
        "group_wait<1>(d_keys, packed)",
        "group_wait<2>(d_keys, packed)",
        0,
        "leaves in flight",
    ),
    "dk: dS packed over what is multiplied": ("group_wait<1>(d_keys, packed);", "", 0, "in flight|race|fence"),
    "dk: no wgmma fence": ("group_fence();", "", 1, "wgmma without a fence"),
    "dk: no wgmma fence after the first wait": ("group_fence();", "", 2, "wgmma without a fence"),
    "dk: no wgmma fence after the second wait": ("group_fence();", "", 3, "wgmma without a fence"),
    "dk: no warp barrier after what is known of the rows": (
        "warp_sync();\n        if (lane_index() == 0) mbarrier_arrive(full",
        "if (lane_index() == 0) mbarrier_arrive(full",
        0,
        "race|nothing wrote",
    ),
    "dk: full before what is known of the rows": (
        "S::rows().begin(2);",
        "S::rows().begin(1);",
        0,
        "race|nothing wrote|one",
    ),
    "dk: sums written while values are read": (
        "group_sync(group);  // no warp of the group reads the",
        "// ",
        0,
        "race",
    ),
    "dk: no proxy fence after the sums": (
        "proxy_fence();\n        own.release",
        "own.release",
        0,
        "without a proxy fence",
    ),
    "dk: a tail one row too long": ("if (left < S::kRows) {", "if (left + 1 < S::kRows) {", 0, "wrong result"),
    "dk: a mask one query too wide": (
        "mask(walk.first, scores, slopes)",
        "mask(walk.first + 1, scores, slopes)",
        0,
        "wrong result",
    ),
    "dk: rows of another tile": ("S::known(at, 8 * j", "S::known(at + 1, 8 * j", 0, "race|nothing wrote|wrong result"),
    "dk: the next head's tiles do not begin anew": (
        "if (first >= static_cast<int>(walked.word[1]))",
        "if (first < 0)",
        0,
        "wrong result",
    ),
    "rows stored before all lanes have written theirs": (
        "Float2{sums[n][2 * half], sums[n][2 * half + 1]});\n            warp_sync();",
        "Float2{sums[n][2 * half], sums[n][2 * half + 1]});",
        0,
        "race|nothing wrote",
    ),
    "rows overwritten before they are stored": ("warp_sync();  // the rows before", "// ", 0, "race"),
    "parts added before they are there": ("group_sync(group);  // the parts", "// ", 0, "race|nothing wrote"),
    "parts over the rows they are made of": (
        "if (part == nullptr) return;\n        warp_sync();",
        "if (part == nullptr) return;",
        0,
        "race",
    ),
    "sums in one order, read in another": (
        "load_shared<Float4>(element(8 * chunk))",
        "load_shared<Float4>(base + 32 * chunk)",
        0,
        "wrong result|race|nothing wrote",
    ),
    "one row too many": (
        "left < 8 ? left : 8;",
        "left < 8 ? left + 1 : 8;",
        0,
        "out of bounds|wrong result|race|nothing wrote",
    ),
    "another swizzle than the tile's": ("Swizzle::k128,", "Swizzle::kNone,", 0, "wrong result|as wide as"),
}
QUICK = ["dq: no wait for the keys", "dk: no wgmma fence after the first wait", "dk: a mask one query too wide"]


def changed(bug, first, *, wide):
    """Return the module with a bug planted in the first of the sources that has the place, `first` before all others.

    One head_dim, or dtype, is enough to show a mistake, and compiles sooner.
    """
    old, new, which, _ = bug
    changes = {x: (build.CSRC / x).read_text() for x in (first, *SHARED, QUERY, KEY, BACKWARD, WIDE)}
    path = next(x for x in changes if old in changes[x])
    pieces = changes[path].split(old)
    assert len(pieces) > which + 1, f"no {old!r}"
    changes[path] = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    dropped = {
        BACKWARD: r"run_of_width<\w+>\(|dtype == " if wide else r" run<T, (64|96)>|run_of_width<Half>|dtype == ",
        WIDE: r"run<Half>" if wide else r" run<\w+>\(",
    }
    for source, pattern in dropped.items():
        changes[source] = "".join(x for x in changes[source].splitlines(True) if not re.search(pattern, x))
    return build.module(changes)


def planted(name):
    return changed(PLANTED[name], KEY if name.startswith("dk") else QUERY, wide=False)


def told(emulator, monkeypatch, head_dim=128, lengths=(383, 130), options=({}, {}, {})):
    """What the emulator, or a look at the gradients, says about the kernels."""
    monkeypatch.setattr(cuda, "_native", emulator)
    monkeypatch.setattr(cuda, "_emulated_hopper", True)
    factors = torch.linspace(1, 4, head_dim // 2, dtype=torch.float64).requires_grad_()
    turned = lk.RopeScaling(head_dim, 1e4, factors)
    first = slice(lengths[0])  # of two sequences
    try:
        for seed, chosen in enumerate(options):
            emulator.seed(seed)
            (q, k, v), bounds = packed(lengths, heads=(2, 1), head_dim=head_dim, seed=seed)
            weight = weight_like(q)

            def run(backend, operands=(q, k, v), weight=weight, bounds=bounds, chosen=chosen):
                leaves = [x.clone().requires_grad_() for x in operands]
                out = lk.attention_varlen(*leaves, bounds, bounds, turned, backend=backend, **chosen)
                return torch.autograd.grad((out * weight).float().sum(), [*leaves, factors])

            results = [run("cuda"), run("reference")]
            for actual, exact in zip(*results, strict=True):
                if not (actual - exact).abs().max() < 0.03 * exact.abs().max():
                    return "wrong result"
            nan = [x.clone() for x in (q, k, v, weight)]
            for x in nan:
                x[lengths[0] :] = float("nan")
            for alone, before in zip(run("cuda", nan[:3], nan[3])[:3], results[0], strict=False):
                if not torch.equal(alone[first], before[first]):
                    return "wrong result beside nan"
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_the_same_look_at_the_sound_kernels_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch) == "nothing"


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in PLANTED])
def test_a_planted_bug_is_caught(emulator, monkeypatch, name):
    said = told(planted(name), monkeypatch)
    assert re.search(PLANTED[name][-1], said), said


# Above head_dim 128 (attention_backward_wide.cu); test_backward.py holds these kernels to what it holds sm_80's to.


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_wide_kernels_conform(hopper, seed):
    hopper.seed(seed)
    options = {"head_dims": [136, 160, 192, 256], "max_tokens": 150, "max_examples": max(EXAMPLES // 4, 1)}
    testing.conformance(backend="cuda", dtypes=DTYPES, **options)


@pytest.mark.parametrize("head_dim", [pytest.param(136, marks=pytest.mark.slow), 256])
def test_wide_gradients_of_several_blocks(hopper, head_dim):
    """Blocks of queries and keys of which the last is not whole, more tiles than stages, and a NaN beyond the end."""
    (q, k, v), bounds = packed([150, 20], (2, 1), head_dim)
    weight = weight_like(q)

    def first(backend):
        grads = gradients(
            (q, k, v), weight, bounds, bounds, scaling(head_dim), backend=backend, attention=lk.attention_varlen
        )
        return [x[:150] for x in grads]

    wanted = first("cuda")
    for actual, exact in zip(wanted, first("reference"), strict=True):
        assert (actual - exact).abs().max() < 0.025 * exact.abs().max()
    for x in (q, k, v, weight):
        x[150:] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(first("cuda"), wanted, strict=True))


def test_products_of_wide_gradients_are_those_of_the_visible_tiles(hopper):
    """Three products for dq in tiles of 128 rows and 64 keys, four for dk and dv in tiles of 64 keys and 64 rows."""
    tokens, head_dim = 256, 256
    q, k, v = operands(heads=(1, 1), tokens=(tokens, tokens), head_dim=head_dim)
    hopper.take_counters()
    gradients((q, k, v), weight_like(q), scaling(head_dim))
    forward = 2 * 128 * (128 + 256)  # two products with 64 keys for a block of 128 rows
    scores = 3 * 128 * (128 + 256) + 4 * 64 * (64 + 128 + 192 + 256)
    assert hopper.take_counters()["products"] == (forward + scores) * head_dim // (16 * 8 * 16)


# As PLANTED.
PLANTED_WIDE = {
    "no wait for keys and values": ("keys.wait_full(blocks);", "", 0, "in flight|nothing wrote|race"),
    "no wait for queries and grad_out": ("rows.wait_full(count);", "", 0, "in flight|nothing wrote|race"),
    "weights taken before they are there": (
        "if (!scorer) wait_for_turn(group);  // the weights",
        "// ",
        0,
        "race|nothing wrote|no thread can go on",
    ),
    "weights given over those not taken": (
        "                wait_for_turn(group);\n                group_fence();",
        "                group_fence();",
        0,
        "race|nothing wrote|no thread can go on|arrives twice",
    ),
    "a turn that is not given": (
        "give_turn(group);\n                group_wait",
        "group_wait",
        0,
        "no thread can go on",
    ),
    "the scores not waited for": ("group_wait<0>(x, held);", "", 0, "in flight|race|fence"),
    "the sums not waited for": ("group_wait<0>(out, packed);", "", 0, "in flight|race|fence"),
    "a stage released before the product with it": (
        "group_wait<0>(out, packed);\n            rows.release(count);",
        "rows.release(count);\n            group_wait<0>(out, packed);",
        0,
        "race|in flight",
    ),
    "no wgmma fence": ("group_fence();", "", 0, "wgmma without a fence"),
    "no wgmma fence before the sums": ("group_fence();", "", 1, "wgmma without a fence"),
    "no proxy fence after the sums": (
        "proxy_fence();\n        keys.release",
        "keys.release",
        0,
        "without a proxy fence",
    ),
    "no proxy fence after the mbarriers": (
        "begin();\n        proxy_fence();",
        "begin();",
        0,
        "without a proxy fence",
    ),
    "no barrier after the mbarriers": ("block_sync();", "", 0, "race|nothing wrote"),
    "dv and dk change places": ("of(!scorer).by_rows()", "of(scorer).by_rows()", 0, "wrong result"),
    "rows along the wrong dimension": (
        "of(!scorer).by_rows()",
        "of(!scorer).by_columns()",
        0,
        "wrong result|nothing wrote|race|out of bounds",
    ),
    "columns of another warp": (
        "load_left(held[step], own, warp_index() % kGroupWarps * 16",
        "load_left(held[step], own, (warp_index() ^ 1) % kGroupWarps * 16",
        0,
        "wrong result",
    ),
    "columns left out": ("int step = S::kHeldSteps;", "int step = S::kHeldSteps + 1;", 0, "wrong result"),
    "weights of another tile": (
        "load_shared<Float4>(S::weights(j))",
        "load_shared<Float4>(S::weights(j ^ 1))",
        0,
        "wrong",
    ),
    "the slope of the softcap left out": ("scores[j][c] * slope;", "scores[j][c];", 0, "wrong result"),
    "lse and delta change places": ("known.at[c % 2 * 2]", "known.at[c % 2 * 2 + 1]", 0, "wrong result"),
    "rows of another stage": (
        "slope_tiles(x, p.scale, count)",
        "slope_tiles(x, p.scale, count + 1)",
        0,
        "wrong|race|nothing",
    ),
    "a mask one query too wide": ("mask(walk.first, x)", "mask(walk.first + 1, x)", 0, "wrong result"),
    "the wrong sums turned back": ("out, scorer ? Regime{}", "out, !scorer ? Regime{}", 0, "wrong result"),
    "a part in another's place": ("work.first / kGroupRows", "work.first / kRows", 0, "wrong result"),
    "a tail one row too long": ("if (left < S::kRows) {", "if (left + 1 < S::kRows) {", 0, "wrong result"),
    "dq: no wait for the values": ("values.wait_full(at * S::kSlabs + slab);", "", 0, "in flight|nothing wrote|race"),
    "dq: values copied over what is read": ("values.wait_free(slab);", "", 0, "race|in flight|one arrival too many"),
    "dq: values released before the product with them": (
        "group_wait<kCount - 1 - kNext + kAfter>();",
        "group_wait<kCount - kNext + kAfter>();",
        0,
        "race",
    ),
    "dq: a slab of values in another's place": ("64 * (slab % S::kSlabs));", "64 * (slab % 2));", 0, "wrong result"),
    "dq: a tail one row too long": ("if (left < S::kKeys) {", "if (left + 1 < S::kKeys) {", 0, "wrong result"),
    "dq: keys copied over what is read": ("keys.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
}
QUICK_WIDE = ["a stage released before the product with it"]
ABOVE_128 = {"head_dim": 136, "lengths": (191, 20), "options": ({"window": 100}, {"softcap": 3.0})}


@pytest.mark.slow
def test_the_same_look_at_the_sound_wide_kernels_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch, **ABOVE_128) == "nothing"


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK_WIDE else pytest.mark.slow) for x in PLANTED_WIDE]
)
def test_a_bug_planted_in_the_wide_kernels_is_caught(emulator, monkeypatch, name):
    kernels = changed(PLANTED_WIDE[name], QUERY if name.startswith("dq") else WIDE, wide=True)
    said = told(kernels, monkeypatch, **ABOVE_128)
    assert re.search(PLANTED_WIDE[name][-1], said), said
