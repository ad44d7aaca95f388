"""Attention of one token over many keys, split over the keys; and the merge of the partial results of split keys.

A program takes one run of SPLIT keys of one (sequence, key head), for the query heads that share it. Keys at
consecutive positions share their rotation: the cos and sin of j = 0, 1, ... BLOCK_KEYS - 1 are computed once and stay
in registers; for each block, which starts at position p0, the query is rotated by its distance to p0 and key p0 + j by
the angle of j. No cos or sin is computed for a key, and no table is read. A run is cut at n-hat, where frequencies
change; the block that n-hat falls in is visited from both sides, each side seeing its own keys.

The query stays in registers in its own dtype, and all rows share one angle: fp32 rows with a phase each spilled.
Several tokens, more than 16 query heads of a key head, and keys at explicit positions go to `forward_kernel`, with
SPLIT.

Bytes: each key and value once, for all rows; partial results are 4 head_dim bytes a row and run, under 2% of the keys
for 8 rows. Operations per key and pair of dims: 6 and two roundings. Bound by memory.

Runs are counted from a sequence's first key and merged in order, so a result depends neither on the batch nor on how
many runs there are. Nothing is read on the host: a CUDA graph can hold it.
"""

import triton
import triton.language as tl

from .forward import softmax_step
from .pages import key_slots, load_keys, load_values
from .tiles import (
    LN_2,
    cos_sin,
    load_dims,
    load_frequency,
    load_pairs,
    phase_of,
    scores_of,
    store_dims,
    visible_keys,
)


@triton.jit
def walk_run(
    acc,
    top,
    total,
    a,
    b,
    query_phase,
    q_rest,
    begin,
    end,
    keys,
    values,
    key_page_stride,
    key_token_stride,
    value_page_stride,
    value_token_stride,
    table,
    page_tokens,
    key_scale,
    value_scale,
    key_tail,
    head,
    key_heads,
    key_length,
    frequency,
    factor,
    scale_log2,
    cap_slope,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Keys [begin, end) of one run, all of one frequency."""
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    j = tl.arange(0, BLOCK_KEYS)
    key_cos = scale_log2
    key_sin = scale_log2
    if HAS_ROPE:
        key_cos, key_sin = cos_sin(phase_of(j.to(tl.int64)[:, None], frequency[None, :]))
    for first in tl.range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        index = first + j
        inside = (index >= begin) & (index < end)
        page, slot = key_slots(first, index, inside, table, page_tokens, ONE_PAGE)
        k_a, k_b, k_rest = load_keys(
            keys + page * key_page_stride + slot * key_token_stride,
            inside,
            first,
            index,
            key_length,
            page,
            page_tokens,
            key_scale,
            key_tail,
            head,
            key_heads,
            PAIRS,
            HEAD_DIM - 2 * PAIRS,
            PAIR_BLOCK,
            REST_BLOCK,
            INTERLEAVED,
            True,
        )
        q_a = a
        q_b = b
        if HAS_ROPE:
            x = k_a.to(tl.float32)
            y = k_b.to(tl.float32)
            c, s = cos_sin(query_phase - phase_of(tl.full((1,), first, tl.int64), frequency))
            # Both sides' attention factor is applied here.
            c = (c * factor)[None, :]
            s = (s * factor)[None, :]
            q_a = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
            q_b = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(a.dtype)
            k_a = (x * key_cos - y * key_sin).to(a.dtype)
            k_b = (y * key_cos + x * key_sin).to(a.dtype)
        if HAS_REST:
            k_rest = k_rest.to(q_rest.dtype)
        scores = scores_of(q_a, q_b, q_rest, k_a, k_b, k_rest, HAS_ROPE, HAS_REST)
        v = load_values(
            values + page * value_page_stride + slot * value_token_stride,
            inside,
            page,
            slot,
            page_tokens,
            value_scale,
            head,
            key_heads,
            key_tail,
            HEAD_DIM,
            VALUE_BLOCK,
            True,
        )
        acc, top, total = softmax_step(
            scores, inside[None, :], acc, top, total, v, scale_log2, cap_slope, cap_log2, HAS_CAP
        )
    return acc, top, total


@triton.jit
def decode_kernel(
    query,
    key,
    value,
    partial,  # fp32 [B, key heads, splits, rows, HEAD_DIM], normalised
    partial_lse,  # fp32 [B, key heads, splits, rows], log 2
    turns,
    base_turns,
    start_tokens,
    attention_factor,
    regime_index,
    query_positions,
    query_start,
    key_start,
    key_length,
    table,  # of a cache in pages: int32[B, N]; else None
    key_scale,  # of a quantised cache, with value_scale and key_tail; else None, see pages.py
    value_scale,
    key_tail,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    query_positions_stride,
    table_stride,
    page_tokens,
    key_heads,
    group,
    splits,
    window_left,
    window_right,
    scale_log2,
    cap_slope,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_QUERY_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    program = tl.program_id(0)
    head = program % key_heads
    sequence = (program // key_heads).to(tl.int64)
    split = tl.program_id(1)

    length = tl.load(key_length + sequence)
    index = tl.load(query_start + sequence)
    first_key = tl.load(key_start + sequence)
    row = tl.arange(0, BLOCK_ROWS)
    in_rows = row < group
    begin, end = visible_keys(index, length, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    begin = tl.maximum(begin, split * SPLIT)
    end = tl.minimum(end, (split + 1) * SPLIT)
    place = ((sequence * key_heads + head) * splits + split) * group + row

    acc = tl.zeros((BLOCK_ROWS, VALUE_BLOCK), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    if begin < end:
        query_rows = query + sequence * query_batch_stride
        query_rows += (head * group + row).to(tl.int64) * query_head_stride
        head_offset = head.to(tl.int64)
        keys = key + head_offset * key_head_stride
        values = value + head_offset * value_head_stride
        if table is None:
            keys += sequence * key_batch_stride + first_key * key_token_stride
            values += sequence * value_batch_stride + first_key * value_token_stride
        else:
            table += sequence * table_stride
        if key_scale is not None:
            key_tail += (sequence * key_heads + head) * 64 * HEAD_DIM
        regime = tl.load(regime_index + sequence)
        a = scale_log2
        b = scale_log2
        q_rest = scale_log2
        query_phase = scale_log2
        frequency = scale_log2
        base_frequency = scale_log2
        factor = scale_log2
        border = begin
        if HAS_ROPE:
            frequency = load_frequency(turns, regime, PAIRS, PAIR_BLOCK)
            base_frequency = load_frequency(base_turns, regime, PAIRS, PAIR_BLOCK)
            start = tl.load(start_tokens + regime)
            factor = tl.load(attention_factor + regime)
            factor = factor * factor
            border = tl.minimum(tl.maximum(start, begin), end).to(tl.int32)
            at = index
            if HAS_QUERY_POSITIONS:
                at = tl.load(query_positions + sequence * query_positions_stride)
            query_phase = phase_of(at, tl.where(at < start, base_frequency, frequency))
            a, b = load_pairs(query_rows, in_rows, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
        if HAS_REST:
            q_rest = load_dims(query_rows, in_rows, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK, True)
        for side in tl.static_range(2):
            if side == 0:
                from_key = begin
                to_key = border
                of_side = base_frequency
            else:
                from_key = border
                to_key = end
                of_side = frequency
            # Not one `and`: the first condition is decided at compile time, the other on the device.
            if side == 1 or HAS_ROPE:  # noqa: SIM102
                if from_key < to_key:
                    acc, top, total = walk_run(
                        acc,
                        top,
                        total,
                        a,
                        b,
                        query_phase,
                        q_rest,
                        from_key,
                        to_key,
                        keys,
                        values,
                        key_batch_stride,
                        key_token_stride,
                        value_batch_stride,
                        value_token_stride,
                        table,
                        page_tokens,
                        key_scale,
                        value_scale,
                        key_tail,
                        head_offset,
                        key_heads,
                        length.to(tl.int32),
                        of_side,
                        factor,
                        scale_log2,
                        cap_slope,
                        cap_log2,
                        HEAD_DIM,
                        PAIRS,
                        PAIR_BLOCK,
                        REST_BLOCK,
                        VALUE_BLOCK,
                        INTERLEAVED,
                        HAS_CAP,
                        ONE_PAGE,
                        BLOCK_KEYS,
                    )
    seen = total != 0.0  # a NaN is
    total = tl.where(seen, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    store_dims(partial + place * HEAD_DIM, in_rows & seen, acc, 0, HEAD_DIM, VALUE_BLOCK)
    tl.store(partial_lse + place, tl.where(seen, top + tl.log2(total), float("-inf")), mask=in_rows)


@triton.jit
def combine_kernel(
    partial,
    partial_lse,
    out,
    lse,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    key_heads,
    group,
    query_tokens,
    splits,
    HEAD_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Merge the runs of one row, in order. A run that the row does not see has lse -inf, and its output is not read.

    Bytes a run and row: 4 head_dim of output, and 4 of lse twice. Operations: 2 head_dim and an exponential. Bound by
    memory; by the latency of a walk over the runs where rows are few, 16 runs at a time.
    """
    rows = query_tokens * group
    program = tl.program_id(0)
    row = program % rows
    head = (program // rows) % key_heads
    b = (program // rows // key_heads).to(tl.int64)
    base = (b * key_heads + head) * splits
    dim = tl.arange(0, VALUE_BLOCK)
    step = tl.arange(0, BLOCK_SPLITS)

    tops = tl.full((BLOCK_SPLITS,), float("-inf"), tl.float32)
    for first in tl.range(0, splits, BLOCK_SPLITS):
        place = (base + first + step) * rows + row
        tops = tl.maximum(tops, tl.load(partial_lse + place, mask=first + step < splits, other=float("-inf")))
    top = tl.max(tops, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)

    acc = tl.zeros((VALUE_BLOCK,), tl.float32)
    total = tl.sum(tl.zeros((BLOCK_SPLITS,), tl.float32), 0)
    for first in tl.range(0, splits, BLOCK_SPLITS):
        place = (base + first + step) * rows + row
        part = tl.load(partial_lse + place, mask=first + step < splits, other=float("-inf"))
        weight = tl.exp2(part - shift)
        mask = (part > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
        values = tl.load(partial + (place * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0)
        acc += tl.sum(values * weight[:, None], 0)
        total += tl.sum(weight, 0)

    seen = total != 0.0  # a NaN is
    total = tl.where(seen, total, 1.0)
    acc = acc * (1.0 / total)
    query_head = head * group + row % group
    target = out + b * out_batch_stride + query_head.to(tl.int64) * out_head_stride
    target += (row // group).to(tl.int64) * out_token_stride
    tl.store(target + dim, acc.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    place = (b * key_heads * group + query_head) * query_tokens + row // group
    tl.store(lse + place, tl.where(seen, (top + tl.log2(total)) * LN_2, float("-inf")))
