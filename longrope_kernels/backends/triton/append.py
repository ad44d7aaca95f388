"""Appending to a cache of unrotated keys: `cache_append`.

`append_kernel` takes one group of 64 indices of one (sequence, key head), whichever of them are new: it writes them to
their pages or, in a quantised cache, rounds the values token by token and, where the group is now whole, the keys
channel by channel, those that came earlier from the tail. `tail_kernel`, a launch of its own because the groups of a
sequence share the tail, leaves the last 64 keys there. What a cache holds does not depend on how the appending was cut.

Bytes: each element once in and once out; to a quantised cache one byte out, 4 for each scale, and keys that wait in the
tail once more in and out. Operations: none for a plain cache; for a quantised one about 10 an element (the largest
magnitude, a product, two limits, a rounding), for fp8 some 15 more in integers. Bound by memory. Nothing is read on the
host: a CUDA graph can hold it.
"""

import triton
import triton.language as tl

from .pages import KEY_GROUP, fp8_bits, key_slots
from .tiles import load_dims, store_dims


@triton.jit
def rounded(x, like, AXIS: tl.constexpr):
    """What `like` points to, int8 or the bits of fp8, and the scale along an axis, for the largest magnitude.

    Where x is not finite the scale is NaN beside zeros; where the inverse of a scale is no number, all are 0. fp8 is
    made in integers on every target: Triton's own conversion rounds twice on sm_89, by way of fp16.
    """
    INT8: tl.constexpr = like.dtype.element_ty == tl.int8
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
    magnitude = tl.abs(x)
    largest = tl.max(magnitude, AXIS)
    finite = tl.min((magnitude < float("inf")).to(tl.int32), AXIS) > 0
    scale = tl.where(finite, tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), float("nan"))
    positive = scale > 0.0
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(positive, scale, 1.0))
    inverse = tl.where(positive & (inverse < float("inf")), inverse, 0.0)
    scaled = x * tl.expand_dims(inverse, AXIS)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if INT8:
        # Adding 1.5 * 2^23 rounds to the nearest integer, halves to even.
        scaled = (scaled + 12582912.0 - 12582912.0).to(tl.int8)
    else:
        scaled = fp8_bits(scaled)
    return scaled, scale


@triton.jit
def new_span(length, count, b, tokens, room):
    """Indices [before, after), int32, of what is new. What a count has past the tokens at hand, or past the room of the
    sequence's pages, which the host does not see, is left out: behind them are the pages of others.
    """
    before = tl.load(length + b)
    after = tl.minimum(before + tl.minimum(tl.load(count + b), tokens), room)
    return before.to(tl.int32), after.to(tl.int32)


@triton.jit
def append_kernel(
    key,
    value,
    key_pages,
    value_pages,
    table,
    length,  # int64[B], before
    count,  # int64[B], tokens to take of key and value
    key_scale,  # of a quantised cache, with value_scale and key_tail; else None
    value_scale,
    key_tail,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    key_pages_batch_stride,
    key_pages_head_stride,
    key_pages_token_stride,
    value_pages_batch_stride,
    value_pages_head_stride,
    value_pages_token_stride,
    table_stride,
    page_tokens,
    key_heads,
    tokens,
    room,
    groups,
    HEAD_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ONE_PAGE: tl.constexpr,
):
    program = tl.program_id(0)
    head = ((program // groups) % key_heads).to(tl.int64)
    b = (program // groups // key_heads).to(tl.int64)
    before, after = new_span(length, count, b, tokens, room)
    first = (before // KEY_GROUP + program % groups) * KEY_GROUP
    if first < after:
        index = first + tl.arange(0, KEY_GROUP)
        new = (index >= before) & (index < after)
        page, slot = key_slots(first, index, new, table + b * table_stride, page_tokens, ONE_PAGE)
        token = (index - before).to(tl.int64)
        source = value + b * value_batch_stride + head * value_head_stride + token * value_token_stride
        values = load_dims(source, new, 0, HEAD_DIM, VALUE_BLOCK, True)
        source = key + b * key_batch_stride + head * key_head_stride + token * key_token_stride
        keys = load_dims(source, new, 0, HEAD_DIM, VALUE_BLOCK, True)
        key_rows = (
            key_pages + head * key_pages_head_stride + page * key_pages_batch_stride + slot * key_pages_token_stride
        )
        value_rows = value_pages + head * value_pages_head_stride
        value_rows += page * value_pages_batch_stride + slot * value_pages_token_stride
        if key_scale is None:
            store_dims(key_rows, new, keys, 0, HEAD_DIM, VALUE_BLOCK)
            store_dims(value_rows, new, values, 0, HEAD_DIM, VALUE_BLOCK)
        else:
            quantised, scale = rounded(values.to(tl.float32), value_pages, 1)
            store_dims(value_rows, new, quantised, 0, HEAD_DIM, VALUE_BLOCK)
            tl.store(value_scale + (page * key_heads + head) * page_tokens + slot, scale, mask=new)
            if first + KEY_GROUP <= after:
                earlier = index < before
                tail_rows = key_tail + ((b * key_heads + head) * KEY_GROUP + index % KEY_GROUP) * HEAD_DIM
                whole = load_dims(tail_rows, earlier, 0, HEAD_DIM, VALUE_BLOCK, True).to(tl.float32)
                group_keys, scales = rounded(keys.to(tl.float32) + whole, key_pages, 0)
                store_dims(key_rows, index >= 0, group_keys, 0, HEAD_DIM, VALUE_BLOCK)
                group = (page * key_heads + head) * (page_tokens // KEY_GROUP) + first % page_tokens // KEY_GROUP
                dim = tl.arange(0, VALUE_BLOCK)
                tl.store(key_scale + group * HEAD_DIM + dim, scales, mask=dim < HEAD_DIM)


@triton.jit
def tail_kernel(
    key,
    key_tail,  # [B, key heads, 64, head_dim]
    length,
    count,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    key_heads,
    tokens,
    room,
    HEAD_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program % key_heads).to(tl.int64)
    b = (program // key_heads).to(tl.int64)
    before, after = new_span(length, count, b, tokens, room)
    index = tl.maximum(before, after - KEY_GROUP) + tl.arange(0, KEY_GROUP)
    new = index < after
    source = key + b * key_batch_stride + head * key_head_stride + (index - before).to(tl.int64) * key_token_stride
    keys = load_dims(source, new, 0, HEAD_DIM, VALUE_BLOCK, True)
    target = key_tail + ((b * key_heads + head) * KEY_GROUP + index % KEY_GROUP) * HEAD_DIM
    store_dims(target, new, keys, 0, HEAD_DIM, VALUE_BLOCK)
