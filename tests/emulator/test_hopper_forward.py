"""The forward kernel for Hopper in the emulator: conformance, what only it could get wrong, planted bugs."""

import re

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends import cuda

from . import build
from .test_kernels import DTYPES, EXAMPLES, operands

FORWARD, PIPELINE = "cuda/sm90/attention_forward.cu", "cuda/sm90/pipeline.cuh"


def scaling(head_dim=64):
    return lk.RopeScaling(head_dim, 1e4)


def packed(lengths, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sizes = (heads[0], heads[1], heads[1])
    return [torch.randn(total, h, head_dim, generator=generator).to(dtype) for h in sizes], bounds


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_kernel_conforms(hopper, seed):
    hopper.seed(seed)
    testing.conformance(
        backend="cuda",
        dtypes=DTYPES,
        max_tokens=300,
        gradients=False,
        max_examples=max(EXAMPLES // 2, 1),
        caches=[False, "int8", "fp8"],
    )


def test_packed_sequences_are_those_that_they_are_alone(hopper):
    lengths = [130, 3, 257, 128, 40]
    (q, k, v), bounds = packed(lengths)
    out, lse = lk.attention_varlen(q, k, v, bounds, bounds, scaling(), return_lse=True, backend="cuda")
    for b in range(len(lengths)):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        one = [x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        alone, alone_lse = lk.attention(*one, scaling(), return_lse=True, backend="cuda")
        assert torch.equal(out[rows], alone[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], alone_lse[0])
        exact = lk.attention(*one, scaling(), backend="reference")
        assert (alone - exact).abs().max() < 0.02


def test_a_neighbour_of_nan_is_not_seen(hopper):
    """A bulk copy of the last tile brings the next sequence's rows too: 0 x NaN must not come of it."""
    (q, k, v), bounds = packed([70, 60])
    wanted = lk.attention_varlen(q, k, v, bounds, bounds, scaling(), backend="cuda")[:70]
    k[70:], v[70:] = float("nan"), float("inf")
    assert torch.equal(lk.attention_varlen(q, k, v, bounds, bounds, scaling(), backend="cuda")[:70], wanted)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_queries_that_see_nothing_are_zero(hopper, head_dim, window):
    """More queries than keys: the first see none."""
    q, k, v = operands(heads=(2, 1), tokens=(200, 60), head_dim=head_dim)
    out, lse = lk.attention(q, k, v, scaling(head_dim), window=window, return_lse=True, backend="cuda")
    exact, exact_lse = lk.attention(q, k, v, scaling(head_dim), window=window, return_lse=True, backend="reference")
    assert torch.equal(out[:, :, :140], torch.zeros_like(out[:, :, :140]))
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert (out - exact).abs().max() < 0.02


def test_expanded_and_far_operands(hopper):
    q, k, v = operands(2, heads=(4, 2), tokens=(64, 64))
    wanted = lk.attention(q, k[:1].expand_as(k), v[:1, :1].expand_as(v).clone(), scaling(), backend="cuda")
    got = lk.attention(q, k[:1].expand_as(k), v[:1, :1].expand_as(v), scaling(), backend="cuda")
    assert torch.equal(got, wanted)
    one = v[:, :, :1].expand_as(v)
    assert torch.equal(
        lk.attention(q, k, one, scaling(), backend="cuda"), lk.attention(q, k, one.clone(), scaling(), backend="cuda")
    )


def test_the_order_of_warps_blocks_and_copies_changes_no_bit(hopper):
    q, k, v = operands(2, (6, 2), (90, 390), 128)
    results = []
    for seed in range(4):
        hopper.seed(seed)
        results.append(lk.attention(q, k, v, scaling(128), return_lse=True, backend="cuda"))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_products_are_those_of_the_visible_tiles(hopper):
    hopper.take_counters()
    tokens, head_dim, rows, keys = 512, 64, 128, 128
    lk.attention(*operands(heads=(1, 1), tokens=(tokens, tokens)), scaling(head_dim), backend="cuda")
    tiles = sum(-(-min(tokens, rows * (i + 1)) // keys) for i in range(tokens // rows))
    per_tile = 2 * rows * keys * head_dim // (16 * 8 * 16)
    assert hopper.take_counters()["products"] == tiles * per_tile


def test_other_gpus_run_the_kernels_of_sm80(emulated):
    assert not cuda.runs_hopper_kernels(torch.device("cpu"))
    emulated.take_counters()
    lk.attention(*operands(), scaling(), backend="cuda")
    assert emulated.take_counters()["matrix_loads"] > 0


@pytest.mark.parametrize(
    ("pairs", "row_blocks", "section"), [(1, 1, 1), (8, 64, 8), (5, 37, 2), (64, 3, 64), (3, 500, 1)]
)
@pytest.mark.parametrize("blocks", [1, 3, 132])
def test_every_tile_is_dealt_once_and_the_work_evenly(emulator, pairs, row_blocks, section, blocks):
    blocks = min(blocks, pairs * row_blocks)
    dealt = [emulator.schedule(pairs, row_blocks, section, b, blocks) for b in range(blocks)]
    assert sorted(x for block in dealt for x in block) == [(p, r) for p in range(pairs) for r in range(row_blocks)]
    work = [sum(row_block + 1 for _, row_block in block) for block in dealt]
    assert max(work) - min(work) <= row_blocks * -(-pairs // section)


# (what stands there, what is put there, the how-manieth, what must be said)
PLANTED = {
    "no wait for the keys": ("rings.keys.wait_full(count);", "", 1, "in flight|nothing wrote|race"),
    "no wait for the first keys": ("rings.keys.wait_full(count);", "", 0, "in flight|nothing wrote|race"),
    "no wait for the values": ("rings.values.wait_full(count - 1);", "", 0, "in flight|nothing wrote|race"),
    "no wait for the last values": ("rings.values.wait_full(count - 1);", "", 1, "in flight|nothing wrote|race"),
    "keys copied over what is read": ("rings.keys.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "values copied over what is read": ("rings.values.wait_free(count);", "", 0, "race|in flight|one arrival too many"),
    "the parity of the wrong phase": ("parity(count) ^ 1", "parity(count)", 0, "no thread can go on|race"),
    "values released before they are read": (
        "group_wait<0>(out, weights);\n                rings.values.release(count - 1);",
        "rings.values.release(count - 1);\n                group_wait<0>(out, weights);",
        0,
        "race",
    ),
    "no warp barrier before the release": (
        "warp_sync();\n        if (lane_index() == 0) mbarrier_arrive(free",
        "if (lane_index() == 0) mbarrier_arrive(free",
        0,
        "race",
    ),
    "scores read before they are there": ("group_wait<1>(scores);", "", 0, "wrong result|in flight"),
    "a wait that leaves the scores in flight": (
        "group_wait<1>(scores)",
        "group_wait<2>(scores)",
        0,
        "leaves in flight",
    ),
    "sums scaled in flight": (
        "group_wait<0>(out, weights);\n                rings",
        "rings",
        0,
        "while the wgmma was in flight|in flight|wrong",
    ),
    "no wgmma fence": ("group_fence();", "", 1, "wgmma without a fence"),
    "no wgmma fence at the end": ("group_fence();", "", 2, "wgmma without a fence"),
    "no proxy fence after the queries": ("proxy_fence();  // and the barrier", "// ", 0, "without a proxy fence"),
    "no barrier after the queries": ("wait_for_turn(group);", "", 0, "race|nothing wrote|without a proxy fence"),
    "queries written while rows are stored": ("group_sync(group);  // the rows", "// ", 0, "race"),
    "rows stored while queries are read": ("group_sync(group);  // no warp", "// ", 0, "race"),
    "no proxy fence after the last values": (
        "copy_async_wait<0>();\n        proxy_fence();",
        "copy_async_wait<0>();",
        0,
        "without a proxy fence",
    ),
    "no wait for the last values' copy": (
        "copy_async_wait<0>();",
        "",
        0,
        "in flight|without a proxy fence|nothing wrote",
    ),
    "no proxy fence after the mbarriers": (
        "begin();\n        proxy_fence();",
        "begin();",
        0,
        "without a proxy fence",
    ),
    "no barrier after the mbarriers": ("block_sync();", "", 0, "race|nothing wrote"),
    "too few bytes expected": (
        "mbarrier_expect(full(count), TileT::kBytes)",
        "mbarrier_expect(full(count), TileT::kBytes - 1024)",
        0,
        "no thread can go on|in flight|one arrival",
    ),
    "a tail one row too long": ("if (left < S::kKeys) {", "if (left + 1 < S::kKeys) {", 0, "wrong result|nan"),
    "a tail copied one row too far": (
        "rings.values.tile(count), left,",
        "rings.values.tile(count), left + 1,",
        0,
        "out of bounds|wrong result",
    ),
    "a mask one key too wide": ("high[r] - first);", "high[r] - first + 1);", 0, "wrong result"),
    "turns that are not given": (
        "give_turn(group);\n                group_wait<1>",
        "group_wait<1>",
        0,
        "no thread can go on",
    ),
    "another swizzle than the tile's": ("Swizzle::k128,", "Swizzle::kNone,", 0, "wrong result|as wide as"),
    "the slab of the values' descriptor": (
        "rings.values.tile(at).by_rows()",
        "rings.values.tile(at).by_columns()",
        0,
        "wrong result|nothing wrote|race|out of bounds",
    ),
}
QUICK = ["no wait for the values", "no proxy fence after the queries", "a mask one key too wide"]


def planted(name):
    old, new, which, _ = PLANTED[name]
    changes = {x: (build.CSRC / x).read_text() for x in (FORWARD, PIPELINE)}
    path = next((x for x in changes if old in changes[x]), FORWARD)
    pieces = changes[path].split(old)
    assert len(pieces) > which + 1, f"no {old!r}"
    changes[path] = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    # One head_dim is enough to show a mistake, and compiles sooner.
    text = "\n".join(x for x in changes[FORWARD].splitlines() if " run<T, " not in x or "<T, 256>" in x)
    changes[FORWARD] = text.replace("run<T, 256>", "run<T, 128>") + "\n"
    return build.module(changes)


def told(emulator, monkeypatch):
    """What the emulator, or a look at the result, says about the kernel."""
    monkeypatch.setattr(cuda, "_native", emulator)
    monkeypatch.setattr(cuda, "_emulated_hopper", True)
    try:
        for seed in range(3):
            emulator.seed(seed)
            (q, k, v), bounds = packed([383, 130], heads=(2, 1), head_dim=128, seed=seed)
            results = [
                lk.attention_varlen(q, k, v, bounds, bounds, scaling(128), backend=backend)
                for backend in ("cuda", "reference")
            ]
            if not (results[0] - results[1]).abs().max() < 0.03:
                return "wrong result"
            k[383:], v[383:] = float("nan"), float("nan")
            alone = lk.attention_varlen(q, k, v, bounds, bounds, scaling(128), backend="cuda")[:383]
            if not torch.equal(alone, results[0][:383]):
                return "wrong result beside nan"
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_the_same_look_at_the_sound_kernel_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch) == "nothing"


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in PLANTED])
def test_a_planted_bug_is_caught(emulator, monkeypatch, name):
    said = told(planted(name), monkeypatch)
    assert re.search(PLANTED[name][-1], said), said
