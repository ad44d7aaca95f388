"""Attention forward with rotation fused in.

A program takes BLOCK_ROWS rows of one (sequence, key head), where rows run over tokens and over the query heads that
share the key head, rotates them once, and walks the key blocks they see with an online softmax:

    S = q k^T     m' = max(m, rowmax S)     P = 2^(S - m')     l = l 2^(m - m') + rowsum P     O = O 2^(m - m') + P v

Keys come unrotated and are rotated in the tile (few row blocks: ROTATE_KEY), or as a scratch copy that one pass of
`rotate_kernel` wrote (many: see `configs.rotates_in_tile`). Blocks that no row sees are not visited; blocks that every
row sees whole run without a mask. Row blocks that see most keys start first.

Operations: 4 head_dim per visible score in the products, one exp2 and about 6 more in the softmax; rotation adds about
35 per pair of dims of a key tile where it is done there. Bytes: queries and output once, keys and values once per row
block, from L2. Bound by the tensor cores, at head_dim 64 as much by exp2. With TILES the blocks that every row sees
whole come through tensor descriptors (descriptors.py), one instruction a tile instead of an address for every 16 bytes;
the masked ones, two or three of a row block, through pointers, which know where a sequence ends.

A row's bits depend on its own interval of keys alone: blocks are counted from a sequence's first key, and a block in
which a row sees nothing leaves its sums as they were. With SPLIT a program takes one run of SPLIT keys, counted
likewise, and leaves a partial result for `combine_kernel` (decode.py).
"""

import triton
import triton.language as tl

from .pages import key_slots, load_keys, load_values
from .tiles import (
    LN_2,
    angles,
    load_dims,
    load_frequency,
    load_pairs,
    place_of,
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
def load_tile(tiles, outer, head, slot, FIRST: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr):
    """Dims [FIRST, FIRST + DIMS) of the keys in slots [slot, slot + KEYS), through a descriptor."""
    return tiles.load([outer, head, slot, FIRST]).reshape(KEYS, DIMS)


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
    key_positions,
    turns,
    base_turns,
    start_tokens,
    factor,
    scale_log2,
    cap_slope,
    cap_log2,
    pair_tiles,
    rest_tiles,
    value_tiles,
    outer,
    first_slot,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATE_KEY: tl.constexpr,
    HAS_KEY_POSITIONS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    TILES: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    for first in tl.range(begin, end, BLOCK_KEYS):
        index = first + tl.arange(0, BLOCK_KEYS)
        inside = index < key_length
        page, slot = key_slots(first, index, inside, table, page_tokens, ONE_PAGE)
        if not TILES:
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
                PAIRS if ROTATE_KEY else PAIR_BLOCK,
                HEAD_DIM - 2 * PAIRS if ROTATE_KEY else REST_BLOCK,
                PAIR_BLOCK,
                REST_BLOCK,
                INTERLEAVED and ROTATE_KEY,
                MASKED,
            )
        else:
            k_a = 0.0
            k_b = 0.0
            k_rest = 0.0
            tile_head = head.to(tl.int32)
            tile_slot = first_slot + first
            if HAS_ROPE:
                k_a = load_tile(pair_tiles, outer, tile_head, tile_slot, 0, BLOCK_KEYS, PAIR_BLOCK)
                k_b = load_tile(pair_tiles, outer, tile_head, tile_slot, PAIR_BLOCK, BLOCK_KEYS, PAIR_BLOCK)
            if HAS_REST:
                k_rest = load_tile(rest_tiles, outer, tile_head, tile_slot, 2 * PAIR_BLOCK, BLOCK_KEYS, REST_BLOCK)
            v = load_tile(value_tiles, outer, tile_head, tile_slot, 0, BLOCK_KEYS, VALUE_BLOCK)
        if ROTATE_KEY:
            if HAS_ROPE:
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
                k_rest = k_rest.to(q_rest.dtype)
        scores = scores_of(q_a, q_b, q_rest, k_a, k_b, k_rest, HAS_ROPE, HAS_REST)
        visible = None
        if MASKED:
            visible = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])
        if not TILES:
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
                MASKED,
            )
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
    query_slot,  # of a packed batch, with the three below: int64[B], first row of the sequence; else None
    query_count,  # int64[B], its query tokens
    block_sequence,  # int32[row blocks], the sequence of each
    block_index,  # int32[row blocks], which block of the sequence; -1: none
    table,  # of a cache in pages: int32[B, N]; else None
    key_scale,  # of a quantised cache, with value_scale and key_tail; else None, see pages.py
    value_scale,
    key_tail,
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
    table_stride,
    page_tokens,
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
    pair_tiles,  # with TILES: descriptors of key, by pieces, and of value, for tiles of BLOCK_KEYS keys; else None
    rest_tiles,
    value_tiles,
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
    ONE_PAGE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    program = tl.program_id(0)
    head = (program // row_blocks) % key_heads
    outer, b, row_block, first_token, count = place_of(
        program % row_blocks,
        program // row_blocks // key_heads,
        row_blocks,
        query_tokens,
        query_slot,
        query_count,
        block_sequence,
        block_index,
    )
    if block_sequence is not None:  # noqa: SIM102
        if row_block < 0:
            return

    length = tl.load(key_length + b)
    query_index = tl.load(query_start + b)
    first_key = tl.load(key_start + b)
    rows = count * group
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

    query_rows = query + outer * query_batch_stride + first_token * query_token_stride
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
            at = tl.load(
                query_positions + outer * query_positions_stride + first_token + row // group, mask=in_rows, other=0
            )
        c, s = angles(at, frequency, base_frequency, start, factor)
        a, b_ = load_pairs(query_rows, in_rows, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
        a = a.to(tl.float32)
        b_ = b_.to(tl.float32)
        q_a = (a * c - b_ * s).to(query.dtype.element_ty)
        q_b = (b_ * c + a * s).to(query.dtype.element_ty)
    if HAS_REST:
        q_rest = load_dims(query_rows, in_rows, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK, True)

    head_offset = head.to(tl.int64)
    keys = key + head_offset * key_head_stride
    values = value + head_offset * value_head_stride
    if table is None:
        keys += outer * key_batch_stride + first_key * key_token_stride
        values += outer * value_batch_stride + first_key * value_token_stride
    else:
        table += b * table_stride
    if key_scale is not None:
        key_tail += (b * key_heads + head) * 64 * HEAD_DIM
    key_at = key_positions + outer * key_positions_stride + first_key
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
                key_count,
                key_at,
                frequency,
                base_frequency,
                start,
                factor,
                scale_log2,
                cap_slope,
                cap_log2,
                pair_tiles,
                rest_tiles,
                value_tiles,
                outer.to(tl.int32),
                first_key.to(tl.int32),
                HEAD_DIM,
                PAIRS,
                PAIR_BLOCK,
                REST_BLOCK,
                VALUE_BLOCK,
                INTERLEAVED,
                ROTATE_KEY,
                HAS_KEY_POSITIONS,
                HAS_CAP,
                ONE_PAGE,
                BLOCK_KEYS,
                part != 1,
                TILES and part == 1,
            )

    seen = total != 0.0  # a NaN is
    total = tl.where(seen, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    log_total = tl.where(seen, top + tl.log2(total), float("-inf"))
    if SPLIT:
        place = (((b * key_heads + head) * splits + split) * rows + row).to(tl.int64)
        store_dims(out + place * HEAD_DIM, in_rows, acc, 0, HEAD_DIM, VALUE_BLOCK)
        tl.store(lse + place, log_total, mask=in_rows)
    else:
        out_rows = out + outer * out_batch_stride + first_token * out_token_stride
        out_rows += row_offsets(row, head, group, out_head_stride, out_token_stride)
        store_dims(out_rows, in_rows, acc, 0, HEAD_DIM, VALUE_BLOCK)
        query_head = (outer * key_heads + head) * group + row % group
        tl.store(lse + query_head * query_tokens + first_token + row // group, log_total * LN_2, mask=in_rows)
