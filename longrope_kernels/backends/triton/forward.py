"""Attention forward with rotation fused in.

A program takes BLOCK_ROWS rows of one (sequence, key head), where rows run over tokens and over the query heads that
share the key head, rotates them once, and walks the key blocks they see with an online softmax:

    S = q k^T     m' = max(m, rowmax S)     P = 2^(S - m')     l = l 2^(m - m') + rowsum P     O = O 2^(m - m') + P v

Keys come unrotated and are rotated in the tile (few row blocks: ROTATE_KEY), or as a scratch copy that one pass of
`rotate_kernel` wrote (many: see `configs.rotates_in_tile`). Blocks that no row sees are not visited; blocks that every
row sees whole run without a mask. Row blocks that see most keys start first.

Operations: 4 head_dim per visible score in the products, one exp2 and about 6 more in the softmax; rotation adds about
35 per pair of dims of a key tile where it is done there. Bytes: queries and output once, keys and values once per row
block, from L2. Bound by the tensor cores, at head_dim 64 as much by exp2.

A row's bits depend on its own interval of keys alone: blocks are counted from a sequence's first key, and a block in
which a row sees nothing leaves its sums as they were. With SPLIT a program takes one run of SPLIT keys, counted
likewise, and leaves a partial result for `combine_kernel` (decode.py).
"""

import triton
import triton.language as tl

from .tiles import (
    LN_2,
    angles,
    load_dims,
    load_frequency,
    load_pairs,
    row_offsets,
    scores_of,
    store_dims,
    tanh,
    visible_keys,
)


@triton.jit
def softmax_step(scores, visible, acc, top, total, values, scale_log2, cap_slope, cap_log2, HAS_CAP: tl.constexpr):
    """One block of the online softmax; `top` and the scores are in units of log 2. Masked scores contribute exact 0."""
    if HAS_CAP:
        scores = tanh(scores * cap_slope) * cap_log2
    else:
        scores = scores * scale_log2
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    shift = now
    if visible is not None:
        shift = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
    return acc, now, total


@triton.jit
def walk_keys(
    acc,
    top,
    total,
    q_a,
    q_b,
    q_rest,
    low,
    high,
    begin,
    end,
    keys,
    values,
    key_token_stride,
    value_token_stride,
    key_length,
    key_positions,
    turns,
    base_turns,
    start_tokens,
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
    ROTATE_KEY: tl.constexpr,
    HAS_KEY_POSITIONS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    for first in tl.range(begin, end, BLOCK_KEYS):
        index = first + tl.arange(0, BLOCK_KEYS)
        inside = index < key_length
        key_rows = keys + index.to(tl.int64) * key_token_stride
        k_a = q_a
        k_b = q_b
        k_rest = q_rest
        if ROTATE_KEY:
            if HAS_ROPE:
                k_a, k_b = load_pairs(key_rows, inside, PAIRS, PAIR_BLOCK, INTERLEAVED, MASKED)
                if HAS_KEY_POSITIONS:
                    at = tl.load(key_positions + index, mask=inside, other=0)
                else:
                    at = index.to(tl.int64)
                c, s = angles(at, turns, base_turns, start_tokens, factor)
                a = k_a.to(tl.float32)
                b = k_b.to(tl.float32)
                k_a = (a * c - b * s).to(q_a.dtype)
                k_b = (b * c + a * s).to(q_a.dtype)
            if HAS_REST:
                k_rest = load_dims(key_rows, inside, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK, MASKED)
        else:
            if HAS_ROPE:
                k_a, k_b = load_pairs(key_rows, inside, PAIR_BLOCK, PAIR_BLOCK, False, MASKED)
            if HAS_REST:
                k_rest = load_dims(key_rows, inside, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK, MASKED)
        scores = scores_of(q_a, q_b, q_rest, k_a, k_b, k_rest, HAS_ROPE, HAS_REST)
        visible = None
        if MASKED:
            visible = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])
        v = load_dims(values + index.to(tl.int64) * value_token_stride, inside, 0, HEAD_DIM, VALUE_BLOCK, MASKED)
        acc, top, total = softmax_step(scores, visible, acc, top, total, v, scale_log2, cap_slope, cap_log2, HAS_CAP)
    return acc, top, total


@triton.jit
def forward_kernel(
    query,
    key,  # as the user gave it, or its scratch copy (ROTATE_KEY: the former)
    value,
    out,  # with SPLIT: fp32 partial results [B, key heads, splits, rows, HEAD_DIM], normalised
    lse,  # fp32 [B, query heads, query tokens], natural; with SPLIT: [B, key heads, splits, rows], log 2
    turns,
    base_turns,
    start_tokens,
    attention_factor,
    regime_index,
    query_positions,
    key_positions,
    query_start,
    key_start,
    key_length,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    query_positions_stride,
    key_positions_stride,
    key_heads,
    group,
    query_tokens,
    row_blocks,
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
    ROTATE_KEY: tl.constexpr,
    HAS_QUERY_POSITIONS: tl.constexpr,
    HAS_KEY_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    program = tl.program_id(0)
    # The last rows see the most keys under a causal mask: they go first, and short programs fill the end.
    row_block = row_blocks - 1 - program % row_blocks
    head = (program // row_blocks) % key_heads
    b = (program // row_blocks // key_heads).to(tl.int64)

    length = tl.load(key_length + b)
    query_index = tl.load(query_start + b)
    first_key = tl.load(key_start + b)
    rows = query_tokens * group
    first_row = row_block * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    in_rows = row < rows
    index = query_index + row // group
    low, high = visible_keys(index, length, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    first_low, first_high = visible_keys(
        query_index + first_row // group, length, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    last_row = tl.minimum(first_row + BLOCK_ROWS, rows) - 1
    last_low, last_high = visible_keys(
        query_index + last_row // group, length, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = first_low // BLOCK_KEYS * BLOCK_KEYS
    end = last_high
    # Between these every row sees every key.
    full_begin = (last_low + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
    full_end = first_high // BLOCK_KEYS * BLOCK_KEYS
    if SPLIT:
        split = tl.program_id(1)
        begin = tl.maximum(begin, split * SPLIT)
        end = tl.minimum(end, (split + 1) * SPLIT)
        full_begin = tl.maximum(full_begin, begin)
        full_end = tl.minimum(full_end, (split + 1) * SPLIT)
    whole = full_end > full_begin
    full_begin = tl.where(whole, full_begin, begin)
    full_end = tl.where(whole, full_end, begin)

    query_rows = query + b * query_batch_stride
    query_rows += row_offsets(row, head, group, query_head_stride, query_token_stride)
    regime = tl.load(regime_index + b)
    q_a = tl.zeros((), tl.float32)
    q_b = q_a
    q_rest = q_a
    frequency = q_a
    base_frequency = q_a
    start = q_a
    factor = q_a
    if HAS_ROPE:
        frequency = load_frequency(turns, regime, PAIRS, PAIR_BLOCK)
        base_frequency = load_frequency(base_turns, regime, PAIRS, PAIR_BLOCK)
        start = tl.load(start_tokens + regime)
        factor = tl.load(attention_factor + regime)
        at = index
        if HAS_QUERY_POSITIONS:
            at = tl.load(query_positions + b * query_positions_stride + row // group, mask=in_rows, other=0)
        c, s = angles(at, frequency, base_frequency, start, factor)
        a, b_ = load_pairs(query_rows, in_rows, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
        a = a.to(tl.float32)
        b_ = b_.to(tl.float32)
        q_a = (a * c - b_ * s).to(query.dtype.element_ty)
        q_b = (b_ * c + a * s).to(query.dtype.element_ty)
    if HAS_REST:
        q_rest = load_dims(query_rows, in_rows, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK, True)

    head_offset = head.to(tl.int64)
    keys = key + b * key_batch_stride + head_offset * key_head_stride + first_key * key_token_stride
    values = value + b * value_batch_stride + head_offset * value_head_stride + first_key * value_token_stride
    key_at = key_positions + b * key_positions_stride + first_key
    key_count = length.to(tl.int32)

    acc = tl.zeros((BLOCK_ROWS, VALUE_BLOCK), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            from_key = begin
            to_key = full_begin
        elif part == 1:
            from_key = full_begin
            to_key = full_end
        else:
            from_key = full_end
            to_key = end
        # Without a left window every row sees from key 0, or from the split's first key, on.
        if part > 0 or HAS_LEFT:
            acc, top, total = walk_keys(
                acc,
                top,
                total,
                q_a,
                q_b,
                q_rest,
                low,
                high,
                from_key,
                to_key,
                keys,
                values,
                key_token_stride,
                value_token_stride,
                key_count,
                key_at,
                frequency,
                base_frequency,
                start,
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
                ROTATE_KEY,
                HAS_KEY_POSITIONS,
                HAS_CAP,
                BLOCK_KEYS,
                part != 1,
            )

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    log_total = tl.where(seen, top + tl.log2(total), float("-inf"))
    if SPLIT:
        place = (((b * key_heads + head) * splits + split) * rows + row).to(tl.int64)
        store_dims(out + place * HEAD_DIM, in_rows, acc, 0, HEAD_DIM, VALUE_BLOCK)
        tl.store(lse + place, log_total, mask=in_rows)
    else:
        out_rows = out + b * out_batch_stride + row_offsets(row, head, group, out_head_stride, out_token_stride)
        store_dims(out_rows, in_rows, acc, 0, HEAD_DIM, VALUE_BLOCK)
        query_head = (b * key_heads + head) * group + row % group
        tl.store(lse + query_head * query_tokens + row // group, log_total * LN_2, mask=in_rows)
