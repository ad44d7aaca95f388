"""The CUDA kernels, run by the emulator: the conformance suite, and what the emulator alone can see."""

import os
import re

import pytest
import torch
from opchecks import check_what_ops_say

import longrope_kernels as lk
from longrope_kernels import testing

from . import build

DTYPES = [torch.float16, torch.bfloat16]
CACHES = [False, "int8", "fp8"]
# A quick draw in `make test`, a thorough one in `make test-emulator`.
EXAMPLES = int(os.environ.get("LONGROPE_EMULATOR_EXAMPLES", "12"))


def operands(batch=1, heads=(4, 2), tokens=(70, 70), head_dim=64, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads[0], tokens[0]), *[(batch, heads[1], tokens[1])] * 2]
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_emulated_kernels_conform(emulated, seed):
    emulated.seed(seed)
    testing.conformance(backend="cuda", dtypes=DTYPES, max_tokens=150, max_examples=EXAMPLES, caches=CACHES)


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_kernels_of_little_shared_memory_conform(little_shared, seed):
    little_shared.seed(seed)
    options = {"head_dims": [80, 96, 128, 256], "max_tokens": 150, "max_examples": max(EXAMPLES // 4, 1)}
    options["caches"] = CACHES
    testing.conformance(backend="cuda", dtypes=DTYPES, **options)


@pytest.mark.parametrize("fixture", ["emulated", "hopper"])
def test_what_ops_say_of_their_results_is_so(request, fixture):
    request.getfixturevalue(fixture)
    check_what_ops_say("cuda", torch.bfloat16)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_kernel_fits_the_least_shared_memory(little_shared, head_dim):
    """Forward, backward, decode from every kind of cache: the emulator refuses a block that the GPU would refuse."""
    q, k, v = (x.requires_grad_() for x in operands(tokens=(40, 40), head_dim=head_dim))
    scaling = lk.RopeScaling(head_dim, 1e4)
    lk.attention(q, k, v, scaling, backend="cuda").float().sum().backward()
    for quantised in (False, "int8", "fp8"):
        cache = lk.KVCache(1, 2, head_dim, 64, q.dtype, quantised)
        cache.append(k.detach(), v.detach(), backend="cuda")
        assert cache.attend(q[:, :, :1].detach(), scaling, backend="cuda").isfinite().all()
    little_shared.multiprocessor_shared(8 << 10)
    with pytest.raises(RuntimeError, match=r"\d+ bytes of shared memory, expected up to 7168"):
        lk.attention(q, k, v, scaling, backend="cuda")


# Keys of a tile, by kernel, and matrix loads of it: a tile of fewer keys has more of them.
@pytest.mark.parametrize(
    ("fixture", "forward", "d_query"), [("emulated", 64, 64), ("little_shared", 32, 32)], ids=["sm_80", "sm_86"]
)
def test_tiles_are_what_a_multiprocessor_has_room_for(request, fixture, forward, d_query):
    kernels = request.getfixturevalue(fixture)
    q, k, v = operands(heads=(1, 1), tokens=(128, 128), head_dim=256)
    kernels.take_counters()
    lk.attention(q, k, v, lk.RopeScaling(256, 1e4), is_causal=False, backend="cuda")
    warps, steps = 8, 16
    assert kernels.take_counters()["matrix_loads"] == 128 // forward * warps * steps * (1 + 2 * forward // 16)
    q, k, v = (x.requires_grad_() for x in operands(heads=(1, 1), tokens=(64, 64), head_dim=128))
    out = lk.attention(q, k, v, lk.RopeScaling(128, 1e4), is_causal=False, backend="cuda")
    kernels.take_counters()
    torch.autograd.grad(out.float().sum(), (q, k, v))
    warps, steps, rows = 4, 8, 32
    of_query = 64 // d_query * warps * steps * (2 * (1 + d_query // 16) + d_query // 16)
    of_key = 64 // rows * warps * steps * (2 * (1 + rows // 16) + 2 * (rows // 16))
    assert kernels.take_counters()["matrix_loads"] == of_query + of_key


def test_tiles_are_read_without_bank_conflicts(emulated):
    emulated.take_counters()
    for head_dim in (32, 64, 96, 128, 256):
        lk.attention(*operands(head_dim=head_dim), lk.RopeScaling(head_dim, 1e4), backend="cuda")
    counters = emulated.take_counters()
    assert counters["matrix_loads"] > 0
    assert counters["bank_conflicts"] == 0


def test_products_are_those_of_the_visible_tiles(emulated):
    """A causal pass visits the tiles up to the diagonal and no others: the tensor cores' work is what the head says."""
    emulated.take_counters()
    tokens, head_dim, rows, keys = 512, 64, 128, 64
    lk.attention(*operands(heads=(1, 1), tokens=(tokens, tokens)), lk.RopeScaling(head_dim, 1e4), backend="cuda")
    tiles = sum(-(-min(tokens, rows * (i + 1)) // keys) for i in range(tokens // rows))
    per_tile = 2 * rows * keys * head_dim // (16 * 8 * 16)
    assert emulated.take_counters()["products"] == tiles * per_tile


def test_the_order_of_warps_and_blocks_changes_no_bit(emulated):
    q, k, v = operands(2, (6, 2), (90, 130), 128)
    results = []
    for seed in range(4):
        emulated.seed(seed)
        results.append(lk.attention(q, k, v, lk.RopeScaling(128, 1e4), return_lse=True, backend="cuda"))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 48, 18])
def test_rotation_in_place_gives_the_same_bits(emulated, dtype, interleaved, rotary_dim):
    from longrope_kernels import functional
    from longrope_kernels.backends import cuda

    scaling = lk.RopeScaling(64, 1e4, rotary_dim=rotary_dim, interleaved=interleaved)
    q, k, _ = operands(2, dtype=dtype)
    wanted = lk.apply_rope(q, k, scaling, backend="cuda")
    rotation, _ = functional.bundle(q, k, k, scaling)
    at = torch.arange(70).expand(2, -1)
    lk.apply_rope_in_place(q, k, scaling, backend="cuda")
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])
    cuda.apply_rope_in_place(q, k, rotation, at, at, True)
    original = operands(2, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for x, y in zip((q, k), original, strict=False):
        assert torch.allclose(x, y, rtol=4 * eps, atol=8 * eps)


def test_operands_that_16_byte_accesses_cannot_read_are_copied(emulated):
    q, k, v = operands(head_dim=64)
    wide = [torch.cat((x[..., :1], x), dim=-1)[..., 1:] for x in (q, k, v)]
    scaling = lk.RopeScaling(64, 1e4)
    assert torch.equal(lk.attention(*wide, scaling, backend="cuda"), lk.attention(q, k, v, scaling, backend="cuda"))


def test_strides_past_32_bits(emulated):
    """Heads of one token, 2^31 elements apart in stride: offsets that wrap would leave the declared memory."""
    q, k, v = operands(heads=(1, 1), tokens=(5, 5))
    far = k.as_strided(k.shape, (2**40, 2**33, 64, 1))
    scaling = lk.RopeScaling(64, 1e4)
    assert torch.equal(lk.attention(q, far, v, scaling, backend="cuda"), lk.attention(q, k, v, scaling, backend="cuda"))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"), [(60, torch.float16, "head_dim 60"), (64, torch.float32, "no torch.float32")]
)
def test_what_there_are_no_kernels_for_is_refused(emulated, head_dim, dtype, reason):
    with pytest.raises(lk.BackendUnavailableError, match=reason):
        lk.attention(*operands(head_dim=head_dim, dtype=dtype), lk.RopeScaling(head_dim, 1e4), backend="cuda")


# Sources with one line changed: (file, what stands there, what is put there, the how-manieth, what must be said).
FORWARD = "cuda/sm80/attention_forward.cu"
DECODE = "cuda/sm80/attention_decode.cuh"
DECODE_KEYS, DECODE_TILES = "cuda/sm80/decode_keys.cuh", "cuda/sm80/decode_tiles.cuh"
COPIES, COMBINE, APPEND = "cuda/sm80/tile_copies.cuh", "cuda/attention_combine.cu", "cuda/cache_append.cu"
ROPE, PREPARE = "cuda/rope.cu", "cuda/prepare_keys.cu"
BACKWARD = "cuda/sm80/attention_backward.cu"
OUTPUT = "cuda/output.cuh"
PLANTED = {
    "no wait for the keys": (FORWARD, "copy_async_wait<0>();", "", 0, "in flight"),
    "no wait for the values": (FORWARD, "copy_async_wait<0>();", "", 1, "in flight"),
    "no barrier after the keys": (
        FORWARD,
        "block_sync();  // the keys",
        "// the keys",
        0,
        "race|in flight|nothing wrote",
    ),
    "no barrier after the values": (
        FORWARD,
        "block_sync();  // the values",
        "// the values",
        0,
        "race|in flight|nothing",
    ),
    "no barrier before the rows are stored": (OUTPUT, "warp_sync();", "", 0, "race|nothing wrote"),
    "keys of the tile before": (COPIES, "next_ += step;", "", 0, "wrong result"),
    "sums kept where a maximum moved": ("cuda/softmax.cuh", "sums[n][c] *= keep[c / 2];", ";", 0, "wrong result"),
    "decode: no wait for the stage": (DECODE, "copy_async_wait<0>();", "copy_async_wait<1>();", 0, "in flight"),
    "decode: no barrier after the wait": (
        DECODE,
        "block_sync();  // the stage is",
        "// ",
        0,
        "race|in flight|nothing wrote",
    ),
    "decode: a stage filled while it is read": (
        DECODE,
        "copies.start(first + S::kKeys, stage ^ 1)",
        "copies.start(first + S::kKeys, stage)",
        0,
        "race|in flight",
    ),
    "decode: sums in a stage that is read": (DECODE, "block_sync();  // the sums take", "// ", 0, "race|nothing wrote"),
    "decode: middles written while they are read": (
        DECODE_KEYS,
        "warp_sync();  // the middle before",
        "// ",
        0,
        "race",
    ),
    "decode: tables written while they are read": (DECODE_KEYS, "block_sync();  // the tables", "// ", 0, "race"),
    "decode: frequencies read before they are there": (
        DECODE_KEYS,
        "block_sync();  // half the",
        "// ",
        0,
        "race|nothing wrote",
    ),
    "decode: the tables of the keys below start_tokens kept": (
        DECODE_KEYS,
        "if (table_ != below)",
        "if (table_ < 0)",
        0,
        "wrong result",
    ),
    "decode: a middle half a token off": (DECODE_KEYS, "(first) + 15u", "(first) + 14u", 0, "wrong result"),
    "decode: keys on the wrong side of the middle": (
        DECODE_KEYS,
        "sine - middle.cos",
        "sine + middle.cos",
        0,
        "wrong result",
    ),
    "decode: keys in the order of their rows": (
        DECODE_TILES,
        "half == 0 ? first - 1 - distance",
        "half == 0 ? first - 8 + distance",
        0,
        "wrong result",
    ),
    "decode: a page too late": (
        DECODE_TILES,
        "if (token >= size)",
        "if (token > size)",
        0,
        "wrong result|out of bounds",
    ),
    "decode: pages of the tile before": (DECODE_TILES, "walk_.step(launch_);", "", 0, "wrong result"),
    "decode: int8 values without their sign": (
        "cuda/rows.cuh",
        "permute(rows ^ 0x80808080u",
        "permute(rows",
        0,
        "wrong result",
    ),
    "decode: a run that ends one key late": (
        DECODE,
        "run_end = run_begin + kSplitKeys;",
        "run_end = run_begin + kSplitKeys + 1;",
        0,
        "wrong result",
    ),
    "decode: rows of another block": (DECODE, "return (first_row + r) / group", "return r / group", 0, "wrong result"),
    "decode: partial results in the place of others": (
        DECODE,
        "* launch.scratch.rows + first_row;",
        "* launch.scratch.rows;",
        0,
        "wrong result|nothing wrote",
    ),
    "dq: no wait": (BACKWARD, "copy_async_wait<0>();", "", 0, "in flight"),
    "dq: no barrier after the wait": (
        BACKWARD,
        "block_sync();  // the tiles are there",
        "// ",
        0,
        "race|in flight|nothing",
    ),
    "dq: tiles filled while they are read": (BACKWARD, "block_sync();  // the tiles are done", "// ", 0, "race"),
    "dq: no barrier before rows turn back": (
        BACKWARD,
        "spread_sums(S::kSums, out, 16 * warp_index(), kHeadDim);\n    block_sync();",
        "spread_sums(S::kSums, out, 16 * warp_index(), kHeadDim);",
        0,
        "race|nothing wrote",
    ),
    "dk: no wait": (BACKWARD, "copy_async_wait<0>();", "", 2, "in flight"),
    "dk: tiles filled while they are read": (BACKWARD, "block_sync();  // the tiles are done", "// ", 1, "race"),
    "dk: sums overwritten while they are read": (
        BACKWARD,
        "block_sync();\n    spread_sums(sums, d_keys",
        "spread_sums(sums, d_keys",
        0,
        "race",
    ),
    "dk: heads that never pass the last": (COPIES, "(wraps ? steps.first.wrap : 0)", "0", 0, "wrong|out of bounds"),
    "dk: what is known of the rows before": (BACKWARD, "arguments.tile.advance(known);", "", 0, "wrong result"),
    "dk: a tile of rows too few": (BACKWARD, "first_key + count - 1).high", "first_key).high", 0, "wrong result"),
    "combine: sums before all largest are known": (COMBINE, "block_sync();", "", 0, "race|nothing wrote"),
    "combine: sums of warps that are not there": (COMBINE, "block_sync();", "", 1, "race|nothing wrote"),
    "append: scales before all keys were looked at": (APPEND, "block_sync();", "", 0, "race|nothing wrote"),
    "rope: the position of a sequence's first token": (ROPE, "_batch_stride + token)", "_batch_stride)", 0, "wrong"),
    "rope: a thread past the last token": (ROPE, "if (b >= p.batch) return;", "", 0, "out of bounds"),
    "prepared keys: turned to the token after": (
        PREPARE,
        "key_position(p, index)",
        "key_position(p, index + 1)",
        0,
        "wrong",
    ),
    "prepared keys: the tail by the token's number": (
        PREPARE,
        "head, index % kKeyGroup",
        "head, index",
        0,
        "out of bounds",
    ),
    "gathered values without their scales": (PREPARE, "x.at[i] *= scale;", ";", 0, "wrong result"),
    "dk: not turned back": (
        BACKWARD,
        "head_dim, count, true, position_of,",
        "head_dim, count, false, position_of,",
        1,
        "wrong result",
    ),
    "a tail that is one row too long": ("cuda/tile.cuh", "row < count &&", "row <= count &&", 0, "out of bounds"),
    "queries one row too many": (
        OUTPUT,
        "if (of_tile < count)",
        "if (of_tile <= count)",
        0,
        "out of bounds|wrong result",
    ),
    "a tile without its swizzle": (
        "cuda/tile.cuh",
        "return row >> 1 & 3;",
        "return 0 * row;",
        0,
        "[1-9].* bank conflicts",
    ),
    "odd steps beside the even ones": (
        "cuda/tile.cuh",
        "(even ^ step % 2 << 5)",
        "even + (step % 2 << 5)",
        0,
        "wrong|nothing wrote|conflicts|out of bounds|in flight",
    ),
    "a swizzle that is read otherwise than written": (
        "cuda/rows.cuh",
        "store_shared(tile.chunk(row, chunk), pack8<T>(x))",
        "store_shared(tile.base + chunk / 4 * (TileT::kRows * 64) + row * 64 + chunk % 4 * 16, pack8<T>(x))",
        0,
        "wrong|nothing wrote|race",
    ),
}
QUICK = ["no wait for the values", "no barrier after the keys", "a tail that is one row too long"]


def planted(name):
    path, old, new, which, _ = PLANTED[name]
    text = (build.CSRC / path).read_text()
    pieces = text.split(old)
    assert len(pieces) > which + 1, f"{path} has no {old!r}"
    text = old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :])
    changes = {path: text}
    # One head_dim is enough to show a mistake, and compiles sooner.
    for source in (FORWARD, DECODE, BACKWARD):
        lines = changes.get(source, (build.CSRC / source).read_text()).splitlines()
        changes[source] = "\n".join(x for x in lines if not re.search(r" run\w*<T, (?!64\b)\d", x)) + "\n"
    return build.module(changes)


def wrong(actual, exact):
    return not (actual - exact).abs().max() < 0.03 * exact.abs().max()


def told(emulator, monkeypatch):
    """What the emulator, or a look at the result and the counters, says about the kernels of a module."""
    from longrope_kernels.backends import cuda

    monkeypatch.setattr(cuda, "_native", emulator)
    emulator.take_counters()
    # Keys below start_tokens, among them and above, each in a tile of its own.
    scaling = lk.RopeScaling(64, 1e4, [2.0] * 32, 100)
    try:
        for seed in range(2):
            emulator.seed(seed)
            # Three heads: a step through the rows passes the last. One: a row too many is one of no head.
            for heads, query_tokens, key_tokens in ((3, 150, 150), (3, 9, 700), (1, 70, 70)):
                q, k, v = operands(heads=(heads, 1), tokens=(query_tokens, key_tokens), seed=seed)
                results = []
                for backend in ("cuda", "reference"):
                    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                    # With a window a key is not seen by all that come after it.
                    out = lk.attention(*leaves, scaling, window=(None, 70)[seed], backend=backend)
                    results.append((out, *torch.autograd.grad((out.float() ** 2).sum(), leaves)))
                for actual, exact in zip(*results, strict=True):
                    if wrong(actual, exact):
                        return "wrong result"
        for quantised, page_tokens in ((False, 24), ("int8", 64)):
            # Two heads: what follows a page of one is not its next page.
            cache = lk.KVCache(1, 2, 64, 200, torch.bfloat16, quantised, page_tokens)
            q, k, v = operands(heads=(4, 2), tokens=(1, 200))
            cache.append(k, v, backend="cuda")
            # Here one tile is below and the next above.
            direct = scaling.replace(start_tokens=128)
            if wrong(*(cache.attend(q, direct, backend=backend) for backend in ("cuda", "reference"))):
                return "wrong result"
            # Of many queries keys and values go through a copy.
            q, _, _ = operands(heads=(4, 2), tokens=(80, 80))
            if wrong(*(cache.attend(q, direct, backend=backend) for backend in ("cuda", "reference"))):
                return "wrong result"
        # Pairs in groups of 8, and others.
        for rotary_dim in (64, 18):
            q, k, _ = operands(2, (3, 2))
            plain = lk.RopeScaling(64, 1e4, rotary_dim=rotary_dim)
            turned, exact = (lk.apply_rope(q, k, plain, backend=backend) for backend in ("cuda", "reference"))
            if any(map(wrong, turned, exact)):
                return "wrong result"
    except RuntimeError as error:
        return str(error)
    return f"{emulator.take_counters()['bank_conflicts']} bank conflicts"


def test_the_same_look_at_sound_sources_finds_nothing(emulator, monkeypatch):
    assert told(emulator, monkeypatch) == "0 bank conflicts"


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in PLANTED])
def test_a_planted_bug_is_caught(emulator, monkeypatch, name):
    said = told(planted(name), monkeypatch)
    assert re.search(PLANTED[name][-1], said), said
