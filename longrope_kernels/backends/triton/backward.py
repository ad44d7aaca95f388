"""Attention backward, rotated back in the epilogue.

    delta_kernel            D = rowsum(dO O) - d lse
    rotate_kernel (twice)   q and k once into scratch copies, which live for this call alone
    backward_query_kernel   rows stay, keys pass:   S, P = 2^(S - lse), dP = dO v^T, dS = P (dP - D), dq += dS k
    backward_key_kernel     keys stay, rows pass:   the same transposed, dv += P^T dO, dk += dS^T q

Two kernels that each recompute the probabilities, and no atomics: the same bits in every run. Rows run over tokens and
the query heads that share a key head, so dk and dv are complete when a program ends.

Per visible score, D for head_dim:

    backward_query_kernel   6 D in products, an exponential and about 5 more
    backward_key_kernel     8 D in products, the same

14 D against 10 of a kernel that adds dq with atomics. Bytes, of e an element: backward_query_kernel reads q, dO and 8
of lse and D and writes dq, 3 e D + 8 a row, and reads k and v, 2 e D a key, once a row block; backward_key_kernel reads
k and v and writes dk and dv, 4 e D a key, and reads q, dO, lse and D, 2 e D + 8 a row, once a key block. What is read
again comes from L2: in bf16 64 rows spend 384 D operations on the 4 D bytes of a key, 96 a byte, and 64 keys 512 D on
those of a row, 128 a byte. Bound by the tensor cores, where L2 keeps up with that. Rotating q and k first costs 4
head_dim bytes a row each; in the tile it would be done once per block of the other operand, in both kernels.

The gradient of inverse frequency i is the sum of p (a db - b da) over positions p >= n-hat, with (a, b) the rotated,
rounded operand and (da, db) its fp32 gradient before it is rotated back. The cross product and the sum are fp64: q's
and k's terms cancel. Each program leaves one row of partial sums.
"""

import triton
import triton.language as tl

from .tiles import (
    angles,
    load_dims,
    load_frequency,
    load_pairs,
    place_of,
    row_offsets,
    scores_of,
    store_dims,
    store_pairs,
    tanh,
    visible_keys,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def delta_kernel(
    out,
    grad_out,
    lse,
    grad_lse,
    delta,  # fp32 [B, query heads, query tokens]
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    grad_out_batch_stride,
    grad_out_head_stride,
    grad_out_token_stride,
    query_heads,
    query_tokens,
    token_blocks,
    HEAD_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One number a row. Bytes: out and dO once, 2 e D + 4, and 8 more with a gradient of lse; operations: 2 D. Bound by
    memory.
    """
    program = tl.program_id(0)
    token = program % token_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = ((program // token_blocks) % query_heads).to(tl.int64)
    b = (program // token_blocks // query_heads).to(tl.int64)
    inside = token < query_tokens
    at = token.to(tl.int64)
    out_rows = out + b * out_batch_stride + head * out_head_stride + at * out_token_stride
    grad_rows = grad_out + b * grad_out_batch_stride + head * grad_out_head_stride + at * grad_out_token_stride
    o = load_dims(out_rows, inside, 0, HEAD_DIM, VALUE_BLOCK, True).to(tl.float32)
    g = load_dims(grad_rows, inside, 0, HEAD_DIM, VALUE_BLOCK, True).to(tl.float32)
    result = tl.sum(o * g, 1)
    place = (b * query_heads + head) * query_tokens + at
    if HAS_GRAD_LSE:
        # A row that sees no key has gradient 0, also where a loss makes a NaN of its lse of -inf.
        seen = tl.load(lse + place, mask=inside, other=float("-inf")) > float("-inf")
        result = tl.where(seen, result - tl.load(grad_lse + place, mask=inside, other=0.0), 0.0)
    tl.store(delta + place, result, mask=inside)


@triton.jit
def probabilities(scores, lse_log2, visible, scale_log2, cap_slope, cap_log2, HAS_CAP: tl.constexpr):
    """P, and the slope of the softcap (1 without one). Masked entries are exact zeros, whatever lse is."""
    slope = 1.0
    if HAS_CAP:
        bounded = tanh(scores * cap_slope)
        slope = 1.0 - bounded * bounded
        p = tl.exp2(bounded * cap_log2 - lse_log2)
    else:
        p = tl.exp2(scores * scale_log2 - lse_log2)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    return p, slope


@triton.jit
def turn_gradient(a, b, grad_a, grad_b, positions, start_tokens, inside):
    """Sum over rows of p (a db - b da), fp64 [PAIR_BLOCK]."""
    cross = a.to(tl.float64) * grad_b.to(tl.float64) - b.to(tl.float64) * grad_a.to(tl.float64)
    weight = tl.where(inside & (positions >= start_tokens), positions, 0).to(tl.float64)
    return tl.sum(cross * weight[:, None], 0)


@triton.jit
def walk_keys_for_query(
    grad_a,
    grad_b,
    grad_rest,
    q_a,
    q_b,
    q_rest,
    grad_out,
    lse_log2,
    delta,
    low,
    high,
    begin,
    end,
    keys,
    values,
    key_token_stride,
    value_token_stride,
    key_length,
    scale_log2,
    cap_slope,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_REST: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first in tl.range(begin, end, BLOCK_KEYS):
        index = first + tl.arange(0, BLOCK_KEYS)
        inside = index < key_length
        key_rows = keys + index.to(tl.int64) * key_token_stride
        k_a = q_a
        k_b = q_b
        k_rest = q_rest
        if HAS_ROPE:
            k_a, k_b = load_pairs(key_rows, inside, PAIR_BLOCK, PAIR_BLOCK, False, MASKED)
        if HAS_REST:
            k_rest = load_dims(key_rows, inside, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK, MASKED)
        v = load_dims(values + index.to(tl.int64) * value_token_stride, inside, 0, HEAD_DIM, VALUE_BLOCK, MASKED)
        visible = None
        if MASKED:
            visible = (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])
        scores = scores_of(q_a, q_b, q_rest, k_a, k_b, k_rest, HAS_ROPE, HAS_REST)
        p, slope = probabilities(scores, lse_log2[:, None], visible, scale_log2, cap_slope, cap_log2, HAS_CAP)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        grad_scores = (p * (grad_p - delta[:, None]) * slope).to(v.dtype)
        if HAS_ROPE:
            grad_a = tl.dot(grad_scores, k_a, grad_a, input_precision="ieee")
            grad_b = tl.dot(grad_scores, k_b, grad_b, input_precision="ieee")
        if HAS_REST:
            grad_rest = tl.dot(grad_scores, k_rest, grad_rest, input_precision="ieee")
    return grad_a, grad_b, grad_rest


@triton.jit
def backward_query_kernel(
    query,  # scratch layout, rotated
    key,  # scratch layout, rotated
    value,
    grad_out,
    lse,
    delta,
    grad_query,
    grad_turns,  # fp64 [programs, PAIRS], written if WANT_TURNS
    turns,
    base_turns,
    start_tokens,
    attention_factor,
    regime_index,
    query_positions,
    query_start,
    key_start,
    key_length,
    query_slot,  # of a packed batch, with the three below, see forward.py; else None
    query_count,
    block_sequence,
    block_index,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    grad_out_batch_stride,
    grad_out_head_stride,
    grad_out_token_stride,
    grad_query_batch_stride,
    grad_query_head_stride,
    grad_query_token_stride,
    query_positions_stride,
    key_heads,
    group,
    query_tokens,
    row_blocks,
    window_left,
    window_right,
    scale,
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
    WANT_TURNS: tl.constexpr,
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
    token = row // group
    low, high = visible_keys(query_index + token, length, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    first_low, first_high = visible_keys(
        query_index + first_row // group, length, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    last_row = tl.minimum(first_row + BLOCK_ROWS, rows) - 1
    last_low, last_high = visible_keys(
        query_index + last_row // group, length, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = first_low // BLOCK_KEYS * BLOCK_KEYS
    end = last_high
    full_begin = (last_low + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
    full_end = first_high // BLOCK_KEYS * BLOCK_KEYS
    whole = full_end > full_begin
    full_begin = tl.where(whole, full_begin, begin)
    full_end = tl.where(whole, full_end, begin)

    head_offset = head.to(tl.int64)
    query_rows = query + outer * query_batch_stride + first_token * query_token_stride
    query_rows += row_offsets(row, head, group, query_head_stride, query_token_stride)
    grad_rows = grad_out + outer * grad_out_batch_stride + first_token * grad_out_token_stride
    grad_rows += row_offsets(row, head, group, grad_out_head_stride, grad_out_token_stride)
    keys = key + outer * key_batch_stride + head_offset * key_head_stride + first_key * key_token_stride
    values = value + outer * value_batch_stride + head_offset * value_head_stride + first_key * value_token_stride
    place = ((outer * key_heads + head) * group + row % group) * query_tokens + first_token + token
    row_lse = tl.load(lse + place, mask=in_rows, other=0.0)
    lse_log2 = tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2_E)
    row_delta = tl.load(delta + place, mask=in_rows, other=0.0)
    g = load_dims(grad_rows, in_rows, 0, HEAD_DIM, VALUE_BLOCK, True)

    q_a = scale
    q_b = scale
    q_rest = scale
    grad_a = scale
    grad_b = scale
    grad_rest = scale
    if HAS_ROPE:
        q_a, q_b = load_pairs(query_rows, in_rows, PAIR_BLOCK, PAIR_BLOCK, False, True)
        grad_a = tl.zeros((BLOCK_ROWS, PAIR_BLOCK), tl.float32)
        grad_b = tl.zeros((BLOCK_ROWS, PAIR_BLOCK), tl.float32)
    if HAS_REST:
        q_rest = load_dims(query_rows, in_rows, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK, True)
        grad_rest = tl.zeros((BLOCK_ROWS, REST_BLOCK), tl.float32)
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
        if part > 0 or HAS_LEFT:
            grad_a, grad_b, grad_rest = walk_keys_for_query(
                grad_a,
                grad_b,
                grad_rest,
                q_a,
                q_b,
                q_rest,
                g,
                lse_log2,
                row_delta,
                low,
                high,
                from_key,
                to_key,
                keys,
                values,
                key_token_stride,
                value_token_stride,
                length.to(tl.int32),
                scale_log2,
                cap_slope,
                cap_log2,
                HEAD_DIM,
                HAS_ROPE,
                HAS_REST,
                PAIR_BLOCK,
                REST_BLOCK,
                VALUE_BLOCK,
                HAS_CAP,
                BLOCK_KEYS,
                part != 1,
            )

    target = grad_query + outer * grad_query_batch_stride + first_token * grad_query_token_stride
    target += row_offsets(row, head, group, grad_query_head_stride, grad_query_token_stride)
    if HAS_ROPE:
        grad_a *= scale
        grad_b *= scale
        at = query_index + token
        if HAS_QUERY_POSITIONS:
            at = tl.load(query_positions + outer * query_positions_stride + first_token + token, mask=in_rows, other=0)
        regime = tl.load(regime_index + b)
        start = tl.load(start_tokens + regime)
        if WANT_TURNS:
            pair = tl.arange(0, PAIR_BLOCK)
            sums = turn_gradient(q_a, q_b, grad_a, grad_b, at, start, in_rows)
            partial = grad_turns + program.to(tl.int64) * PAIRS
            tl.store(partial + pair, sums, mask=pair < PAIRS)
        c, s = angles(
            at,
            load_frequency(turns, regime, PAIRS, PAIR_BLOCK),
            load_frequency(base_turns, regime, PAIRS, PAIR_BLOCK),
            start,
            tl.load(attention_factor + regime),
        )
        store_pairs(target, in_rows, grad_a * c + grad_b * s, grad_b * c - grad_a * s, PAIRS, PAIR_BLOCK, INTERLEAVED)
    if HAS_REST:
        store_dims(target, in_rows, grad_rest * scale, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK)


@triton.jit
def walk_rows_for_key(
    grad_a,
    grad_b,
    grad_rest,
    grad_v,
    k_a,
    k_b,
    k_rest,
    v,
    index,
    begin,
    end,
    query,  # of the sequence
    grad_out,  # of the sequence
    lse,  # of the key head's first query head
    delta,  # likewise
    query_head_stride,
    query_token_stride,
    grad_out_head_stride,
    grad_out_token_stride,
    query_index,
    key_length,
    head,
    query_tokens,
    count,
    window_left,
    window_right,
    scale_log2,
    cap_slope,
    cap_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_REST: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    for first in tl.range(begin, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token = row // GROUP
        in_rows = token < count
        query_rows = query + row_offsets(row, head, GROUP, query_head_stride, query_token_stride)
        q_a = k_a
        q_b = k_b
        q_rest = k_rest
        if HAS_ROPE:
            q_a, q_b = load_pairs(query_rows, in_rows, PAIR_BLOCK, PAIR_BLOCK, False, MASKED)
        if HAS_REST:
            q_rest = load_dims(query_rows, in_rows, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK, MASKED)
        grad_rows = grad_out + row_offsets(row, head, GROUP, grad_out_head_stride, grad_out_token_stride)
        g = load_dims(grad_rows, in_rows, 0, HEAD_DIM, VALUE_BLOCK, MASKED)
        place = (row % GROUP).to(tl.int64) * query_tokens + token
        visible = None
        if MASKED:
            row_lse = tl.load(lse + place, mask=in_rows, other=0.0)
            row_delta = tl.load(delta + place, mask=in_rows, other=0.0)
            row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
            low, high = visible_keys(query_index + token, key_length, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            visible = (index[:, None] >= low[None, :]) & (index[:, None] < high[None, :]) & in_rows[None, :]
        else:
            row_lse = tl.load(lse + place)
            row_delta = tl.load(delta + place)
        scores = scores_of(k_a, k_b, k_rest, q_a, q_b, q_rest, HAS_ROPE, HAS_REST)
        p, slope = probabilities(scores, (row_lse * LOG2_E)[None, :], visible, scale_log2, cap_slope, cap_log2, HAS_CAP)
        grad_v = tl.dot(p.to(g.dtype), g, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(g), input_precision="ieee")
        grad_scores = (p * (grad_p - row_delta[None, :]) * slope).to(g.dtype)
        if HAS_ROPE:
            grad_a = tl.dot(grad_scores, q_a, grad_a, input_precision="ieee")
            grad_b = tl.dot(grad_scores, q_b, grad_b, input_precision="ieee")
        if HAS_REST:
            grad_rest = tl.dot(grad_scores, q_rest, grad_rest, input_precision="ieee")
    return grad_a, grad_b, grad_rest, grad_v


@triton.jit
def backward_key_kernel(
    query,  # scratch layout, rotated
    key,  # scratch layout, rotated
    value,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    grad_turns,  # fp64 [programs, PAIRS], written if WANT_TURNS
    turns,
    base_turns,
    start_tokens,
    attention_factor,
    regime_index,
    key_positions,
    query_start,
    key_start,
    key_length,
    query_slot,  # of a packed batch, with the three below, see forward.py; else None
    query_count,
    block_sequence,
    block_index,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    grad_out_batch_stride,
    grad_out_head_stride,
    grad_out_token_stride,
    grad_key_batch_stride,
    grad_key_head_stride,
    grad_key_token_stride,
    grad_value_batch_stride,
    grad_value_head_stride,
    grad_value_token_stride,
    key_positions_stride,
    key_heads,
    key_tokens,  # slots of key: nothing is written past them, whatever length the device was told
    query_tokens,
    key_blocks,
    window_left,
    window_right,
    scale,
    scale_log2,
    cap_slope,
    cap_log2,
    GROUP: tl.constexpr,  # query heads of a key head: rows are divided by it in the loop
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_KEY_POSITIONS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WANT_TURNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    program = tl.program_id(0)
    # The first keys are seen by the most rows under a causal mask, and go first.
    head = (program // key_blocks) % key_heads
    outer, b, key_block, first_token, count = place_of(
        key_blocks - 1 - program % key_blocks,
        program // key_blocks // key_heads,
        key_blocks,
        query_tokens,
        query_slot,
        query_count,
        block_sequence,
        block_index,
    )
    if block_sequence is not None:  # noqa: SIM102
        if key_block < 0:
            return

    query_index = tl.load(query_start + b)
    first_key = tl.load(key_start + b)
    length = tl.minimum(tl.load(key_length + b), key_tokens - first_key)
    first = key_block * BLOCK_KEYS
    index = first + tl.arange(0, BLOCK_KEYS)
    inside = index < length
    last = tl.minimum(first + BLOCK_KEYS, length) - 1

    # Token t, of index i = query_index + t, sees key j where j - right <= i <= j + left. `some` see a key of the block,
    # `all` see every one.
    some_begin = query_index * 0
    some_end = query_index * 0 + count
    all_begin = some_begin
    all_end = some_end
    if HAS_RIGHT:
        some_begin = tl.minimum(tl.maximum(first - window_right - query_index, 0), count)
        all_begin = tl.minimum(tl.maximum(last - window_right - query_index, 0), count)
    if HAS_LEFT:
        some_end = tl.minimum(tl.maximum(last + window_left + 1 - query_index, 0), count)
        all_end = tl.minimum(tl.maximum(first - query_index + window_left + 1, 0), count)
    if first >= length:
        some_end = some_begin
    if last - first + 1 < BLOCK_KEYS:
        # The last block of a sequence reaches past its end, and is masked throughout.
        all_end = all_begin
    begin = (some_begin * GROUP).to(tl.int32) // BLOCK_ROWS * BLOCK_ROWS
    end = (some_end * GROUP).to(tl.int32)
    full_begin = ((all_begin * GROUP).to(tl.int32) + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    full_end = (all_end * GROUP).to(tl.int32) // BLOCK_ROWS * BLOCK_ROWS
    whole = full_end > full_begin
    full_begin = tl.where(whole, full_begin, begin)
    full_end = tl.where(whole, full_end, begin)

    head_offset = head.to(tl.int64)
    # Rows are the block's first and the number of a key behind it: 64 bits a key would stay in registers for the end.
    slot = first_key + first
    behind = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    key_rows = key + outer * key_batch_stride + head_offset * key_head_stride + slot * key_token_stride
    key_rows += behind * key_token_stride
    value_rows = value + outer * value_batch_stride + head_offset * value_head_stride + slot * value_token_stride
    value_rows += behind * value_token_stride
    v = load_dims(value_rows, inside, 0, HEAD_DIM, VALUE_BLOCK, True)
    k_a = scale
    k_b = scale
    k_rest = scale
    grad_a = scale
    grad_b = scale
    grad_rest = scale
    if HAS_ROPE:
        k_a, k_b = load_pairs(key_rows, inside, PAIR_BLOCK, PAIR_BLOCK, False, True)
        grad_a = tl.zeros((BLOCK_KEYS, PAIR_BLOCK), tl.float32)
        grad_b = tl.zeros((BLOCK_KEYS, PAIR_BLOCK), tl.float32)
    if HAS_REST:
        k_rest = load_dims(key_rows, inside, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK, True)
        grad_rest = tl.zeros((BLOCK_KEYS, REST_BLOCK), tl.float32)
    grad_v = tl.zeros((BLOCK_KEYS, VALUE_BLOCK), tl.float32)
    first_query_row = (outer * key_heads + head) * GROUP * query_tokens + first_token
    for part in tl.static_range(3):
        if part == 0:
            from_row = begin
            to_row = full_begin
        elif part == 1:
            from_row = full_begin
            to_row = full_end
        else:
            from_row = full_end
            to_row = end
        grad_a, grad_b, grad_rest, grad_v = walk_rows_for_key(
            grad_a,
            grad_b,
            grad_rest,
            grad_v,
            k_a,
            k_b,
            k_rest,
            v,
            index,
            from_row,
            to_row,
            query + outer * query_batch_stride + first_token * query_token_stride,
            grad_out + outer * grad_out_batch_stride + first_token * grad_out_token_stride,
            lse + first_query_row,
            delta + first_query_row,
            query_head_stride,
            query_token_stride,
            grad_out_head_stride,
            grad_out_token_stride,
            query_index,
            length,
            head,
            query_tokens,
            count,
            window_left,
            window_right,
            scale_log2,
            cap_slope,
            cap_log2,
            GROUP,
            HEAD_DIM,
            HAS_ROPE,
            HAS_REST,
            PAIR_BLOCK,
            REST_BLOCK,
            VALUE_BLOCK,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_CAP,
            BLOCK_ROWS,
            part != 1,
        )

    target = grad_value + outer * grad_value_batch_stride + head_offset * grad_value_head_stride
    target += slot * grad_value_token_stride
    store_dims(target + behind * grad_value_token_stride, inside, grad_v, 0, HEAD_DIM, VALUE_BLOCK)
    target = grad_key + outer * grad_key_batch_stride + head_offset * grad_key_head_stride
    target += slot * grad_key_token_stride + behind * grad_key_token_stride
    if HAS_ROPE:
        grad_a *= scale
        grad_b *= scale
        at = index.to(tl.int64)
        if HAS_KEY_POSITIONS:
            at = tl.load(key_positions + outer * key_positions_stride + slot + behind, mask=inside, other=0)
        regime = tl.load(regime_index + b)
        start = tl.load(start_tokens + regime)
        if WANT_TURNS:
            pair = tl.arange(0, PAIR_BLOCK)
            sums = turn_gradient(k_a, k_b, grad_a, grad_b, at, start, inside)
            partial = grad_turns + program.to(tl.int64) * PAIRS
            tl.store(partial + pair, sums, mask=pair < PAIRS)
        c, s = angles(
            at,
            load_frequency(turns, regime, PAIRS, PAIR_BLOCK),
            load_frequency(base_turns, regime, PAIRS, PAIR_BLOCK),
            start,
            tl.load(attention_factor + regime),
        )
        store_pairs(target, inside, grad_a * c + grad_b * s, grad_b * c - grad_a * s, PAIRS, PAIR_BLOCK, INTERLEAVED)
    if HAS_REST:
        store_dims(target, inside, grad_rest * scale, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK)
