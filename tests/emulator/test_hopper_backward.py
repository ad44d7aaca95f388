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

BACKWARD, GRADIENTS = "cuda/sm90/attention_backward.cu", "cuda/sm90/gradients.cuh"
PIPELINE = "cuda/sm90/pipeline.cuh"


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
    """Several blocks, the last of which is not whole, and more keys than queries."""
    q, k, v = operands(2, (4, 2), (200, 330), head_dim)
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
    "dq: no wait for the values": ("values.wait_full(count);", "", 1, "in flight|nothing wrote|race"),
    "dq: keys copied over what is read": ("keys.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "dq: values copied over what is read": ("values.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "dq: queries copied over what is read": ("rows.wait_free(blocks);", "", 0, "race|in flight|one arrival too many"),
    "dq: keys released before the product with them": (
        "group_wait<1>(out, packed);\n                keys.release(count - 1);",
        "keys.release(count - 1);\n                group_wait<1>(out, packed);",
        0,
        "race",
    ),
    "dq: values released before the product with them": (
        "group_wait<0>(scores, slopes);\n                values.release(count);",
        "values.release(count);\n                group_wait<0>(scores, slopes);",
        1,
        "race",
    ),
    "dq: dS packed over what is multiplied": (
        "group_wait<1>(out, packed);",
        "",
        0,
        "in flight|race|wgmma without a fence",
    ),
    "dq: a wait that leaves a product in flight": (
        "group_wait<1>(out, packed)",
        "group_wait<2>(out, packed)",
        0,
        "leaves in flight",
    ),
    "dq: no wgmma fence": ("group_fence();", "", 1, "wgmma without a fence"),
    "dq: no wgmma fence after the wait": ("group_fence();", "", 2, "wgmma without a fence"),
    "dq: no wgmma fence at the end": ("group_fence();", "", 3, "wgmma without a fence"),
    "dq: turns that are not given": (
        "give_turn(group);\n                group_wait<0>(scores, slopes);\n                values",
        "group_wait<0>(scores, slopes);\n                values",
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
        "copy_async_wait<0>();\n    proxy_fence();",
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
        "S::values().begin();\n        proxy_fence();",
        "S::values().begin();",
        0,
        "without a proxy fence",
    ),
    "dq: no barrier after the mbarriers": ("block_sync();", "", 0, "race|nothing wrote"),
    "dq: too few bytes expected": (
        "mbarrier_expect(rows.full(blocks), to.kBytes)",
        "mbarrier_expect(rows.full(blocks), to.kBytes - 1024)",
        0,
        "no thread can go on|in flight|one arrival",
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
    "dk: no wgmma fence": ("group_fence();", "", 5, "wgmma without a fence"),
    "dk: no wgmma fence after the first wait": ("group_fence();", "", 6, "wgmma without a fence"),
    "dk: no wgmma fence after the second wait": ("group_fence();", "", 7, "wgmma without a fence"),
    "dk: no warp barrier after what is known of the rows": (
        "warp_sync();\n                if (lane_index() == 0) mbarrier_arrive(rows.full(count));\n                if",
        "if (lane_index() == 0) mbarrier_arrive(rows.full(count));\n                if",
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
        "mask(first, scores, slopes)",
        "mask(first + 1, scores, slopes)",
        0,
        "wrong result",
    ),
    "dk: rows of another tile": ("S::known(at, 8 * j", "S::known(at + 1, 8 * j", 0, "race|nothing wrote|wrong result"),
    "dk: the next head's tiles do not begin anew": (
        "if (first >= static_cast<int>(range.word[1]))",
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


def planted(name):
    old, new, which, _ = PLANTED[name]
    changes = {x: (build.CSRC / x).read_text() for x in (BACKWARD, GRADIENTS, PIPELINE)}
    path = next((x for x in changes if old in changes[x]), BACKWARD)
    pieces = changes[path].split(old)
    assert len(pieces) > which + 1, f"no {old!r}"
    changes[path] = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    # One head_dim is enough to show a mistake, and compiles sooner.
    changes[BACKWARD] = changes[BACKWARD].replace("if (head_dim <= 64) return run<T, 64>", "return run<T, 128>")
    lines = [x for x in changes[BACKWARD].splitlines() if not re.search(r"head_dim <= |  run<T, 128>", x)]
    changes[BACKWARD] = "\n".join(lines).replace("const int64_t head_dim = params.forward.head_dim;\n", "\n") + "\n"
    return build.module(changes)


def told(emulator, monkeypatch):
    """What the emulator, or a look at the gradients, says about the kernels."""
    monkeypatch.setattr(cuda, "_native", emulator)
    monkeypatch.setattr(cuda, "_emulated_hopper", True)
    factors = torch.linspace(1, 4, 64, dtype=torch.float64).requires_grad_()
    turned = lk.RopeScaling(128, 1e4, factors)
    try:
        for seed in range(3):
            emulator.seed(seed)
            (q, k, v), bounds = packed([383, 130], heads=(2, 1), head_dim=128, seed=seed)
            weight = weight_like(q)

            def run(backend, operands=(q, k, v), weight=weight, bounds=bounds):
                leaves = [x.clone().requires_grad_() for x in operands]
                out = lk.attention_varlen(*leaves, bounds, bounds, turned, backend=backend)
                return torch.autograd.grad((out * weight).float().sum(), [*leaves, factors])

            results = [run("cuda"), run("reference")]
            for actual, exact in zip(*results, strict=True):
                if not (actual - exact).abs().max() < 0.03 * exact.abs().max():
                    return "wrong result"
            nan = [x.clone() for x in (q, k, v, weight)]
            for x in nan:
                x[383:] = float("nan")
            for alone, before in zip(run("cuda", nan[:3], nan[3])[:3], results[0], strict=False):
                if not torch.equal(alone[:383], before[:383]):
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
