"""What all kernels share: the fixed-point angle, loads of a head's dims in pieces, visibility, the softcap.

A tile of head dims is three: the first of each rotary pair (a), the second (b), and the dims that do not rotate (rest),
each padded with zeros to a power of two. A rotation is then elementwise, nothing is shuffled between registers, and

    q . k = dot(q_a, k_a) + dot(q_b, k_b) + dot(q_rest, k_rest)

whatever the layout of the pairs in memory. Interleaved pairs are loaded as one contiguous tile and split in registers.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cos_sin(phase):
    """cos and sin of an int32 phase in 2^-32 turn; the polynomial and its coefficients are those of csrc/core/phase.h.

    tl.cos and tl.sin carry a Payne-Hanek reduction: hundreds of local loads for an argument that is reduced already.
    """
    # The nearest quadrant, without an addition that can overflow, and what is left: its bits 29 and up, sign extended.
    quadrant = ((phase >> 29) + 1) >> 1
    x = ((phase << 2) >> 2).to(tl.float32) * 1.46291807926715968e-9  # 2 pi / 2^32, x in [-pi/4, pi/4]
    x2 = x * x
    sine = x + x * x2 * (-0.16666650669203337 + x2 * (0.008331978658137475 + x2 * -0.000194956356072684))
    cosine = 1.0 + x2 * (-0.5 + x2 * (0.04166664686633811 + x2 * (-0.0013887367510479265 + x2 * 2.4438450974851804e-5)))
    swap = (quadrant & 1) != 0
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -c, c), tl.where((quadrant & 2) != 0, -s, s)


@triton.jit
def phase_of(positions, frequency):
    """The upper half of the 64-bit product: overflow is the reduction modulo a turn. Negative indices wrap alike."""
    return ((positions * frequency) >> 32).to(tl.int32)


@triton.jit
def load_frequency(table, regime, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr):
    pair = tl.arange(0, PAIR_BLOCK)
    return tl.load(table + regime * PAIRS + pair, mask=pair < PAIRS, other=0)


@triton.jit
def angles(positions, turns, base_turns, start_tokens, factor):
    """factor * cos and sin, [N, PAIR_BLOCK], at int64[N] positions."""
    frequency = tl.where((positions < start_tokens)[:, None], base_turns[None, :], turns[None, :])
    c, s = cos_sin(phase_of(positions[:, None], frequency))
    return c * factor, s * factor


@triton.jit
def load_dims(rows, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Dims [FIRST, FIRST + COUNT) of the rows that `rows` [N] points to, zeros up to BLOCK and where not inside."""
    dim = tl.arange(0, BLOCK)
    pointers = rows[:, None] + (FIRST + dim)[None, :]
    if MASKED:
        if COUNT == BLOCK:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (dim < COUNT)[None, :], other=0.0)
    else:
        if COUNT == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(dim < COUNT)[None, :], other=0.0)
    return tile


@triton.jit
def load_pairs(
    rows,
    inside,
    PAIRS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):
    if INTERLEAVED:
        both = load_dims(rows, inside, 0, 2 * PAIRS, 2 * PAIR_BLOCK, MASKED)
        a, b = tl.split(tl.reshape(both, (both.shape[0], PAIR_BLOCK, 2)))
    else:
        a = load_dims(rows, inside, 0, PAIRS, PAIR_BLOCK, MASKED)
        b = load_dims(rows, inside, PAIRS, PAIRS, PAIR_BLOCK, MASKED)
    return a, b


@triton.jit
def store_dims(rows, inside, tile, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    dim = tl.arange(0, BLOCK)
    mask = inside[:, None] & (dim < COUNT)[None, :]
    tl.store(rows[:, None] + (FIRST + dim)[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def store_pairs(rows, inside, a, b, PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIR_BLOCK))
        store_dims(rows, inside, both, 0, 2 * PAIRS, 2 * PAIR_BLOCK)
    else:
        store_dims(rows, inside, a, 0, PAIRS, PAIR_BLOCK)
        store_dims(rows, inside, b, PAIRS, PAIRS, PAIR_BLOCK)


@triton.jit
def row_offsets(row, head, group, head_stride, token_stride):
    """Where the rows of a key head start. Rows run over tokens, and within a token over the query heads that share it.

    64-bit: tokens x heads x head_dim passes 2^31 at contexts people use.
    """
    query_head = head * group + row % group
    return query_head.to(tl.int64) * head_stride + (row // group).to(tl.int64) * token_stride


@triton.jit
def place_of(entry, sequence, blocks, tokens, slots, counts, block_sequence, block_index):
    """Outer index of a row block's operands, its sequence, its number there, and the sequence's first token and count.

    A packed batch names the sequence and the block of each entry (plans.schedule), and its operands have one outer
    index. Otherwise blocks count down: the last rows see the most keys under a causal mask, they go first, and short
    programs fill the end.

    Counts past the operand's tokens, which the host does not see, end with them.
    """
    if block_sequence is None:
        outer = sequence.to(tl.int64)
        b = outer
        block = blocks - 1 - entry
        first_token = tl.full((), 0, tl.int64)
        count = tokens
    else:
        outer = tl.full((), 0, tl.int64)
        b = tl.load(block_sequence + entry).to(tl.int64)
        block = tl.load(block_index + entry)
        first_token = tl.load(slots + b)
        count = tl.minimum(tl.load(counts + b), tokens - first_token).to(tl.int32)
    return outer, b, block, first_token, count


@triton.jit
def visible_keys(index, key_length, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The interval [low, high) of key indices, int32, that queries at int64 `index` see; both rise with the index."""
    low = index * 0
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(index - window_left, 0), key_length)
    high = index * 0 + key_length
    if HAS_RIGHT:
        high = tl.minimum(index + window_right + 1, key_length)
    return low.to(tl.int32), tl.maximum(high, low).to(tl.int32)


@triton.jit
def tanh(x):
    """tanh to 2e-7, absolute and relative: from e^(-2|x|) away from zero, a polynomial near it (csrc/cpu/vec.h)."""
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = magnitude + magnitude * x2 * (
        -0.333333333 + x2 * (0.133333333 + x2 * (-0.0539682540 + x2 * (0.0218694885 + x2 * -0.00886323553)))
    )
    value = tl.where(magnitude < 0.25, near, far)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def scores_of(q_a, q_b, q_rest, k_a, k_b, k_rest, HAS_ROPE: tl.constexpr, HAS_REST: tl.constexpr):
    """Rows of the first by rows of the second, fp32. A piece that the head does not have is not looked at."""
    if HAS_ROPE:
        scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
        if HAS_REST:
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    else:
        scores = tl.dot(q_rest, tl.trans(k_rest), input_precision="ieee")
    return scores
