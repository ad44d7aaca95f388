"""Rotation of queries or keys: `apply_rope`, and the scratch copies that attention reads.

A program takes BLOCK tokens of one sequence and computes their cos and sin once, in registers, for all heads: a
position costs 2 to 4 integer multiply-adds and a polynomial of 9 terms for each pair, shared by the heads, and no
table is read. Bytes: each element once in and once out. Bound by memory.

Out may be x: no program reads what another one writes, and within one the threads meet at a barrier between the loads
of a head and its stores, since a tile of fewer elements than threads is loaded by several of them. What does not rotate
is then left where it is.

The scratch layout is [a | b | rest], each padded with zeros to a power of two, whatever the layout of the pairs: rows
are aligned, and kernels read them without masks in the head dimension.
"""

import triton
import triton.language as tl

from .tiles import angles, load_dims, load_frequency, load_pairs, place_of, store_dims, store_pairs


@triton.jit
def rotate_kernel(
    x,
    out,
    turns,
    base_turns,
    start_tokens,
    attention_factor,
    regime_index,
    positions,  # int64[B, T], read if HAS_POSITIONS
    first_index,  # int64[B]: the position of token 0 where none are given
    slots,  # of a packed batch, with the three below: int64[B], the sequence's first row of [1, H, T, D]; else None
    counts,  # int64[B], its tokens
    block_sequence,
    block_index,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    positions_batch_stride,
    heads,
    tokens,
    token_blocks,
    heads_in_program,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TO_SCRATCH: tl.constexpr,
    IN_PLACE: tl.constexpr,  # out is x
    BLOCK: tl.constexpr,
):
    HAS_ROPE: tl.constexpr = PAIRS > 0
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * PAIRS
    program = tl.program_id(0)
    outer, b, block, first_token, count = place_of(
        program % token_blocks,
        program // token_blocks,
        token_blocks,
        tokens,
        slots,
        counts,
        block_sequence,
        block_index,
    )
    if block_sequence is not None:  # noqa: SIM102
        if block < 0:
            return
    first_head = tl.program_id(1) * heads_in_program
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    if HAS_ROPE:
        regime = tl.load(regime_index + b)
        if HAS_POSITIONS:
            at = tl.load(positions + outer * positions_batch_stride + first_token + token, mask=inside, other=0)
        else:
            at = tl.load(first_index + b) + token
        c, s = angles(
            at,
            load_frequency(turns, regime, PAIRS, PAIR_BLOCK),
            load_frequency(base_turns, regime, PAIRS, PAIR_BLOCK),
            tl.load(start_tokens + regime),
            tl.load(attention_factor + regime),
        )
        if CONJUGATE:
            s = -s
    x_rows = x + outer * x_batch_stride + (first_token + token) * x_token_stride
    out_rows = out + outer * out_batch_stride + (first_token + token) * out_token_stride
    for head in tl.range(first_head, tl.minimum(first_head + heads_in_program, heads)):
        head_offset = tl.full((), head, tl.int64)
        source = x_rows + head_offset * x_head_stride
        target = out_rows + head_offset * out_head_stride
        if HAS_ROPE:
            a, b_ = load_pairs(source, inside, PAIRS, PAIR_BLOCK, INTERLEAVED, True)
            a = a.to(tl.float32)
            b_ = b_.to(tl.float32)
            turned_a = a * c - b_ * s
            turned_b = b_ * c + a * s
            if IN_PLACE:
                tl.debug_barrier()
            if TO_SCRATCH:
                store_pairs(target, inside, turned_a, turned_b, PAIR_BLOCK, PAIR_BLOCK, False)
            else:
                store_pairs(target, inside, turned_a, turned_b, PAIRS, PAIR_BLOCK, INTERLEAVED)
        if HAS_REST and not IN_PLACE:
            rest = load_dims(source, inside, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK, True)
            if TO_SCRATCH:
                store_dims(target, inside, rest, 2 * PAIR_BLOCK, REST_BLOCK, REST_BLOCK)
            else:
                store_dims(target, inside, rest, 2 * PAIRS, HEAD_DIM - 2 * PAIRS, REST_BLOCK)
