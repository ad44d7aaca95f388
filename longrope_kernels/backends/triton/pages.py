"""Where the keys of a sequence lie, and what they are: slots of one tensor, of pages, or int8 or fp8 with scales.

Key i of sequence b is slot i % page_tokens of page table[b, i // page_tokens]. A block of keys that divides a page
reads one entry of the table and then consecutive slots (ONE_PAGE); otherwise each key reads its own entry, from L1.

A quantised cache (`longrope_kernels.Pages`) has a scale per channel for each group of 64 keys and a scale per token of
the values. A block divides a group, so it needs one row of scales; the keys of the last, unfinished group are read in
full precision from the tail. Bytes: 2 head_dim + 4 a key, and 4 head_dim for each group, 0.52 of a bf16 cache.

fp8 is e4m3: a sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity, 0x7f for NaN. Targets without that type
(sm_80; gfx942, whose own has another bias) take it as uint8 (`arguments.read`) and convert it in integers.
"""

import triton
import triton.language as tl

from .tiles import load_dims, load_pairs

KEY_GROUP = tl.constexpr(64)


@triton.jit
def widened(x):
    """fp32 of what a quantised cache holds: int8, fp8, or the bits of fp8 as uint8."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        magnitude = bits & 127
        # Exponent and mantissa in the place of fp16's: the biases differ by 8, and subnormals are subnormal.
        half = ((magnitude << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True)
        y = tl.where(magnitude == 127, float("nan"), half.to(tl.float32) * 256.0)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def fp8_bits(x):
    """The bits of fp32 as fp8, to the nearest, halves to even, at most 448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
    rebased = magnitude - (120 << 23)
    code = (rebased + 0x7FFFF + ((rebased >> 20) & 1)) >> 20
    # Below 2^-6 steps are 2^-9, those of fp32 from 2^14 on: the addition rounds.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), small, code) | ((bits >> 24) & 128)
    return tl.where(x == x, code, 127).to(tl.uint8)


@triton.jit
def key_slots(first, index, inside, table, page_tokens, ONE_PAGE: tl.constexpr):
    """Page and slot, int64, of the keys at int32 `index`, the first of them `first`. Without a table there is one page.

    A table is that of the sequence.
    """
    if table is None:
        page = tl.full((), 0, tl.int64)
        slot = index.to(tl.int64)
    elif ONE_PAGE:
        page = tl.load(table + first // page_tokens).to(tl.int64)
        slot = (first % page_tokens + (index - first)).to(tl.int64)
    else:
        page = tl.load(table + index // page_tokens, mask=inside, other=0).to(tl.int64)
        slot = (index % page_tokens).to(tl.int64)
    return page, slot


@triton.jit
def load_keys(
    rows,  # pointers to keys [N]
    inside,
    first,  # index of the first key; read where the cache is quantised
    index,
    key_length,
    page,
    page_tokens,
    key_scale,  # of a quantised cache: [pages, key heads, page_tokens / 64, head_dim], or None
    key_tail,  # of the sequence and head: [64, head_dim]
    head,
    key_heads,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,  # dims behind those that rotate
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The three pieces of a block of keys; fp32 from a quantised cache. A piece that the head does not have is 0."""
    a = 0.0
    b = 0.0
    rest = 0.0
    if key_scale is None:
        if PAIRS > 0:
            a, b = load_pairs(rows, inside, PAIRS, PAIR_BLOCK, INTERLEAVED, MASKED)
        if REST > 0:
            rest = load_dims(rows, inside, 2 * PAIRS, REST, REST_BLOCK, MASKED)
    else:
        # Of each sum below one term is 0: a block is of a whole group or of the tail.
        waits = first >= key_length // KEY_GROUP * KEY_GROUP
        group = (page * key_heads + head) * (page_tokens // KEY_GROUP) + first % page_tokens // KEY_GROUP
        scales = key_scale + group * (2 * PAIRS + REST) + tl.full((1,), 0, tl.int32)
        scaled = tl.full((1,), 1, tl.int32) > waits.to(tl.int32)
        tail_rows = key_tail + index % KEY_GROUP * (2 * PAIRS + REST)
        quantised = inside & scaled
        tailed = inside & (scaled == 0)
        if PAIRS > 0:
            a, b = load_pairs(rows, quantised, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
            scale_a, scale_b = load_pairs(scales, scaled, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
            tail_a, tail_b = load_pairs(tail_rows, tailed, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
            a = widened(a) * scale_a + tail_a.to(tl.float32)
            b = widened(b) * scale_b + tail_b.to(tl.float32)
        if REST > 0:
            rest = widened(load_dims(rows, quantised, 2 * PAIRS, REST, REST_BLOCK, True))
            rest = rest * load_dims(scales, scaled, 2 * PAIRS, REST, REST_BLOCK, True)
            rest += load_dims(tail_rows, tailed, 2 * PAIRS, REST, REST_BLOCK, True).to(tl.float32)
    return a, b, rest


@triton.jit
def load_values(
    rows,
    inside,
    page,
    slot,
    page_tokens,
    value_scale,  # of a quantised cache: [pages, key heads, page_tokens], or None
    head,
    key_heads,
    like,  # a pointer to the dtype wanted of a quantised cache
    HEAD_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    if value_scale is None:
        values = load_dims(rows, inside, 0, HEAD_DIM, VALUE_BLOCK, MASKED)
    else:
        scale = tl.load(value_scale + (page * key_heads + head) * page_tokens + slot, mask=inside, other=0.0)
        values = widened(load_dims(rows, inside, 0, HEAD_DIM, VALUE_BLOCK, True)) * scale[:, None]
        values = values.to(like.dtype.element_ty)
    return values
