"""Gradients of the emulated kernels, those for Ampere and those for Hopper, beside what the conformance suite already
holds them to.
"""

import re

import pytest
import torch

import longrope_kernels as lk
from longrope_kernels import testing
from longrope_kernels.backends import cuda

from . import build
from .conftest import SHARED
from .test_kernels import DTYPES, EXAMPLES, operands


@pytest.fixture(params=["emulated", "hopper"])
def kernels(request):
    return request.getfixturevalue(request.param)


def gradients(backend, dtype=torch.float16, start_tokens=0, offset=0):
    """Of query, key, value and the rescale factors, through out and lse."""
    factors = torch.linspace(1, 4, 16, dtype=torch.float64).requires_grad_()
    scaling = lk.RopeScaling(32, 1e4, factors, start_tokens=start_tokens)
    leaves = [x.requires_grad_() for x in operands(2, (4, 2), (70, 90), 32, dtype)]
    at = torch.arange(90) + offset
    options = {"query_positions": at[:70], "key_positions": at, "window": 50, "softcap": 20.0}
    out, lse = lk.attention(*leaves, scaling, **options, return_lse=True, backend=backend)
    return torch.autograd.grad((out.float() ** 2).sum() + lse.sin().sum(), [*leaves, factors])


@pytest.mark.parametrize("start_tokens", [0, 20])
def test_gradient_of_the_rescale_factors(kernels, start_tokens):
    actual, exact = (gradients(backend, start_tokens=start_tokens)[3] for backend in ("cuda", "reference"))
    assert torch.allclose(actual, exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


def test_gradient_of_the_rescale_factors_does_not_move_with_the_positions(kernels):
    near, far = (gradients("cuda", offset=offset)[3] for offset in (0, 10**6))
    assert (near - far).abs().max() < 0.1 * near.abs().max()


def test_the_order_of_warps_and_blocks_changes_no_bit_of_a_gradient(kernels):
    results = []
    for seed in range(3):
        kernels.seed(seed)
        results.append(gradients("cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_a_packed_batch_are_those_of_its_sequences(kernels):
    scaling = lk.RopeScaling(64, 1e4)
    lengths = [3, 70, 0, 20]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)
    ]
    out = lk.attention_varlen(*leaves, bounds, bounds, scaling, backend="cuda")
    weight = torch.randn(out.shape, generator=generator).bfloat16()
    packed = torch.autograd.grad(out, leaves, weight)
    for b, count in enumerate(lengths):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        if count == 0:
            continue
        alone = [x[rows].detach().transpose(0, 1).unsqueeze(0).requires_grad_() for x in leaves]
        one = lk.attention(*alone, scaling, backend="cuda")
        wanted = torch.autograd.grad(one, alone, weight[rows].transpose(0, 1).unsqueeze(0))
        for a, e in zip(packed, wanted, strict=True):
            assert torch.equal(a[rows], e[0].transpose(0, 1))


# Above head_dim 128 two warps share 16 rows (sm80/attention_backward_wide.cu), and on Hopper two warpgroups 64 keys.
WIDE, DELTA = "cuda/sm80/attention_backward_wide.cu", "cuda/attention_delta.cu"


@pytest.fixture(params=["emulated", "little_shared", pytest.param("hopper", marks=pytest.mark.slow)])
def wide(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["emulated", "little_shared"])
def wide_of_sm_80(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_wide_kernels_conform(wide, seed):
    wide.seed(seed)
    options = {"head_dims": [136, 160, 192, 256], "max_tokens": 150, "max_examples": max(EXAMPLES // 3, 1)}
    testing.conformance(backend="cuda", dtypes=DTYPES, **options)


def wide_gradients(backend, head_dim=136, tokens=(70, 110), seed=0, change=lambda *x: None, **options):
    """Of query, key, value and the rescale factors, through out and lse."""
    leaves = operands(2, (4, 2), tokens, head_dim, seed=seed)
    change(*leaves)
    factors = torch.linspace(1, 4, head_dim // 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*leaves, factors)]
    scaling = lk.RopeScaling(head_dim, 1e4, factors, start_tokens=20)
    out, lse = lk.attention(*leaves[:3], scaling, return_lse=True, backend=backend, **options)
    return torch.autograd.grad((out.float() ** 2).nansum() + lse[lse.isfinite()].sin().sum(), leaves)


@pytest.mark.parametrize("head_dim", [136, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"window": 33}, {"softcap": 3.0}], ids=str)
def test_wide_gradients_are_those_of_the_reference(wide, head_dim, options):
    for actual, exact in zip(*[wide_gradients(x, head_dim, **options) for x in ("cuda", "reference")], strict=True):
        assert (actual - exact).abs().max() < 0.025 * exact.abs().max()


def test_wide_gradients_have_the_same_bits_in_every_run(wide):
    results = []
    for seed in range(3):
        wide.seed(seed)
        results.append(wide_gradients("cuda", 256))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_products_of_wide_gradients_are_those_of_the_visible_tiles(wide_of_sm_80):
    """Three for dq in tiles of 32 keys, four for dk and dv in tiles of 32 rows, or 16 where a block has 99 KB."""
    tokens, block = 256, 64
    q, k, v = (x.requires_grad_() for x in operands(heads=(1, 1), tokens=(tokens, tokens), head_dim=256))
    out = lk.attention(q, k, v, lk.RopeScaling(256, 1e4), backend="cuda")
    wide_of_sm_80.take_counters()
    torch.autograd.grad(out.float().sum(), (q, k, v))
    # A causal mask: a block of rows sees all keys up to its last; those that see a block of keys begin with its first.
    columns = sum(range(block, tokens + 1, block))
    product = block * columns * 256 // (16 * 8 * 16)
    assert wide_of_sm_80.take_counters()["products"] == (3 + 4) * product


@pytest.mark.parametrize("window", [None, 33])
def test_what_sees_nothing_has_no_wide_gradient(wide, window):
    """More queries than keys, or keys out of every window: zeros; tiles that nobody sees are not even read."""
    d_query = wide_gradients("cuda", tokens=(110, 40), window=window)[0]
    assert not d_query[:, :, :70].any()
    assert d_query[:, :, 70:].abs().amin((0, 1, 3)).max() > 0

    def spoil(query, key, value):
        key[:, :, :64] = value[:, :, :64] = float("nan")

    results = [wide_gradients("cuda", tokens=(20, 110), window=20, change=x) for x in (lambda *x: None, spoil)]
    for clean, spoiled in zip(*[x[:3] for x in results], strict=True):  # frequencies: 0 x NaN
        assert torch.equal(clean, spoiled)
    for x in results[0][1:3]:
        assert not x[:, :, :71].any()


@pytest.mark.parametrize(("fixture", "rows"), [("emulated", 32), ("little_shared", 16)])
def test_rows_of_a_tile_are_as_many_as_fit(request, fixture, rows):
    """A row of dk's tile takes its operands from shared memory once for every tile: fewer rows, more loads."""
    kernels = request.getfixturevalue(fixture)
    q, k, v = (x.requires_grad_() for x in operands(heads=(1, 1), tokens=(64, 64), head_dim=256))
    out = lk.attention(q, k, v, lk.RopeScaling(256, 1e4), is_causal=False, backend="cuda")
    kernels.take_counters()
    torch.autograd.grad(out.float().sum(), (q, k, v))
    warps, steps, tiles = 8, 16, 64 // rows
    d_query = warps * steps + 2 * (warps * steps * 2 + warps * 2 * steps // 2)
    d_key = tiles * (warps * steps * (1 + rows // 16) + warps * rows // 16 * steps)
    assert kernels.take_counters()["matrix_loads"] == d_query + d_key


# (what stands there, what is put there, the how-manieth, what must be said)
PLANTED = {
    "dq: no wait for the rows": ("copy_async_wait<0>();", "", 0, "in flight"),
    "dq: no barrier after the rows": ("block_sync();  // the rows are there", "// ", 0, "race|in flight|nothing wrote"),
    "dq: keys copied over rows that are read": ("block_sync();  // the rows are in registers", "// ", 0, "race|flight"),
    "dq: no wait for the stage": ("copy_async_wait<0>();", "", 1, "in flight"),
    "dq: no barrier at the stage": ("block_sync();  // the stage is", "// ", 0, "race|in flight|nothing wrote"),
    "dq: the weights taken too early": ("team_sync();  // the weights are there", "// ", 1, "race|nothing|waits"),
    "dq: dS taken too early": ("team_sync();  // dS is there", "// ", 0, "race|waits"),
    "dq: sums over a stage that is read": ("block_sync();  // the stages are done with", "// ", 0, "race"),
    "dq: both warps take the same columns": ("scorer ? 0 : kSteps / 2", "0", 0, "wrong result"),
    "dq: sums of both warps in one place": ("scorer ? 0 : kHeadDim / 2", "0", 0, "race|nothing wrote|wrong result"),
    "dq: the other warp's rows": (
        "const int row = 16 * team()",
        "const int row = 16 * (team() ^ 1)",
        0,
        "wrong result",
    ),
    "dk: a tile of rows left out": (
        "* kTileRows;\n    const int64_t end",
        "* kTileRows + kTileRows;\n    const int64_t end",
        0,
        "wrong",
    ),
    "dk: rows that see the last keys left out": ("first_key + count - 1).high", "first_key).high", 0, "wrong result"),
    "dk: no wait for the stage": ("copy_async_wait<0>();", "", 2, "in flight"),
    "dk: no barrier at the stage": ("block_sync();  // the stage is", "// ", 1, "race|in flight|nothing wrote"),
    "dk: the stage that is read copied over": ("kTileRows, stage ^ 1);", "kTileRows, stage);", 0, "race|in flight"),
    "dk: weights given over those not taken": ("if (from > 0) team_sync();", "", 0, "race"),
    "dk: weights taken before they are there": ("if (!scorer) team_sync();", "", 0, "race|nothing wrote|waits"),
    "dk: dv and dk change places": (
        "S::stage(stage).of(!scorer), 0",
        "S::stage(stage).of(scorer), 0",
        0,
        "wrong result",
    ),
    "dk: the slope of the softcap left out": ("sees ? weight * slope", "sees ? weight * p.scale", 0, "wrong result"),
    "dk: lse and delta change places": (
        "scorer ? known.lse(row) : known.delta(row)",
        "!scorer ? known.lse(row) : known.delta(row)",
        0,
        "wrong",
    ),
    "dk: sums over a stage that is read": ("block_sync();  // the stages are done with; where", "// ", 0, "race"),
    "dk: dv stored before it is there": ("block_sync();  // dv is there", "// ", 0, "race|nothing wrote"),
    "dk: dk written over dv": ("block_sync();  // dv has left", "// ", 0, "race"),
    "dk: stored before it is there": ("block_sync();  // dk is there", "// ", 0, "race|nothing wrote"),
    "dk: not turned back": (
        "count, true, position_of, sums_at",
        "count, false, position_of, sums_at",
        0,
        "wrong result",
    ),
    "delta: rows past the end": ("j * R::kAtOnce >= left ||", "", 0, "out of bounds|wrong result"),
    "delta: dims past the row's": ("|| chunk * kChunk >= p.head_dim", "", 0, "out of bounds|wrong result"),
    "delta: half of a row's lanes": ("mask = kLanes / 2", "mask = kLanes / 4", 0, "wrong result"),
    "delta: another row's": ("if (chunk == j)", "if (chunk == (j ^ 1))", 0, "wrong result"),
    "delta: rows that are stored twice": ("chunk >= kSteps ||", "chunk > kSteps ||", 0, "out of bounds|wrong result"),
    "tiles that do not fit sm_86": (
        "if (blocks_that_fit(multiprocessor_shared(), KeyShape<32>::kSharedBytes) > 0)",
        "if (multiprocessor_shared() > 0)",
        0,
        "of shared memory, expected",
    ),
}
QUICK = ["dk: weights given over those not taken", "dq: dS taken too early", "tiles that do not fit sm_86"]


def planted(name):
    old, new, which, _ = PLANTED[name]
    path = DELTA if name.startswith("delta") else WIDE
    pieces = (build.CSRC / path).read_text().split(old)
    assert len(pieces) > which + 1, f"no {old!r}"
    text = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    # One dtype is enough to show a mistake, and compiles sooner.
    lines = [x for x in text.splitlines() if "run<Half>" not in x]
    return build.module({path: "\n".join(lines) + "\n"})


def told(emulator, monkeypatch):
    """What the emulator, or a look at the gradients, says about the kernels of sm_86 above head_dim 128."""
    monkeypatch.setattr(cuda, "_native", emulator)
    monkeypatch.setattr(cuda, "_emulated_hopper", False)
    emulator.multiprocessor_shared(SHARED["sm_86"])
    emulator.take_counters()
    try:
        for seed, options in enumerate(({"window": 60}, {"softcap": 3.0})):
            emulator.seed(seed)
            results = [wide_gradients(x, seed=seed, **options) for x in ("cuda", "reference")]
            for actual, exact in zip(*results, strict=True):
                if not (actual - exact).abs().max() < 0.03 * exact.abs().max():
                    return "wrong result"
    except RuntimeError as error:
        return str(error)
    finally:
        emulator.multiprocessor_shared(SHARED["sm_90"])
    return f"{emulator.take_counters()['bank_conflicts']} bank conflicts"


def test_the_same_look_at_the_sound_kernels_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch) == "0 bank conflicts"


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in PLANTED])
def test_a_planted_bug_is_caught(emulator, monkeypatch, name):
    said = told(planted(name), monkeypatch)
    assert re.search(PLANTED[name][-1], said), said
