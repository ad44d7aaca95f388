// Attention of few rows over many keys, for Ampere and newer: split keys, cached before rotation, contiguous or paged,
// in the dtype of the query, int8 or fp8.
//
// A block takes one run of 512 keys of one (sequence, key head) and 16 of its rows: the query heads that share the key
// head, times a few tokens. More rows are more blocks of the same run, side by side in the grid: the first of them
// brings the keys from memory, the others find them in L2. Tiles of keys and values arrive two deep (decode_tiles.cuh).
// Every warp takes 16 keys of a tile: it widens and rotates them in registers between shared memory and the tensor
// cores (decode_keys.cuh, decode_packed.cuh), has an online softmax and a sum of values of its own. At the end the
// warps' sums become one partial result, which attention_combine adds to the others. A tile takes one barrier.
//
// Bytes: keys and values once (4 head_dim a key in 16 bits, 2 head_dim and the scales in 8), partial results 2 parts
// in 100 of them. Instructions of a key of head_dim 128: 10 cycles of a multiprocessor's schedulers (half of them
// rotation and scores), and 14 of its shared memory (of 8 bits 9), beside 25 to 35 (13 to 18) that its bytes take from
// memory; docs/cuda.md has the others. The products are 1 part in 16 of what the tensor cores could do. Bound by
// memory.
//
// A quantised key is widened by its channel's scale before it is rotated; the scale of a value multiplies its
// probability, so that the product takes int8 and fp8 values as they are, which is exact in fp16.
//
// A source for each format of the cache compiles it: attention_decode.cu, attention_decode_int8.cu,
// attention_decode_fp8.cu.
#pragma once

#include "../queries.cuh"
#include "../softmax.cuh"
#include "decode_keys.cuh"
#include "decode_packed.cuh"
#include "decode_tiles.cuh"

namespace longrope {

// A row of the query tile, in the order of columns that the products take.
template <class T, int kHeadDim, class S>
struct QueryRow {
    Columns<kHeadDim> columns;
    int row;

    LONGROPE_DEVICE void store8(int chunk, const Float8& x) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) store1(8 * chunk + i, x.at[i]);
    }
    LONGROPE_DEVICE void store1(int dim, float x) const {
        const typename S::QueryTile tile{0};
        store_shared(tile.element(row, Places<S>::query_column(columns.column(dim))), narrow<T>(x));
    }
};

// What a block works on. In 32 bits, as divisions in 64 are long.
struct DecodeWork {
    int group;  // query heads that share the key head
    uint32_t b, key_head;
    int split;      // of the keys
    int first_row;  // of the sequence's rows
    int64_t place;  // of that row in the partial results

    LONGROPE_DEVICE DecodeWork(const DecodeLaunch& launch, uint32_t block) : group(launch.group) {
        const uint32_t row_blocks = launch.row_blocks, run = block / row_blocks;
        const uint32_t splits = static_cast<uint32_t>(launch.scratch.splits);
        const uint32_t heads = static_cast<uint32_t>(launch.params.key_heads);
        first_row = static_cast<int>(block % row_blocks) * kBlockRows;
        split = static_cast<int>(run % splits);
        key_head = run / splits % heads;
        b = run / splits / heads;
        place = run * launch.scratch.rows + first_row;
    }
    // Rows of the block that exist; none, or less: the block has nothing to do.
    LONGROPE_DEVICE int rows(const Sequence& s) const {
        const int left = static_cast<int>(s.query_count * group) - first_row;
        return left < kBlockRows ? left : kBlockRows;
    }
    LONGROPE_DEVICE int token(int r) const { return (first_row + r) / group; }
    LONGROPE_DEVICE int head(int r) const { return static_cast<int>(key_head) * group + (first_row + r) % group; }
};

// The queries of the block, rotated; zeros in rows and columns that are none. In fp32 in the second stage, if they are
// to be packed.
template <class T, int kHeadDim, class S>
LONGROPE_DEVICE void load_decode_queries(const AttentionParams& p, const Sequence& s, const DecodeWork& work,
                                         const Regime& regime, int rows) {
    for (int i = thread_index(); i < S::kHalfTurns / 16; i += S::kThreads) store_shared(16 * i, Vec16{});
    block_sync();  // the zeros are below
    const int head_dim = static_cast<int>(p.head_dim);
    const auto rotate = [&](const auto& to) {
        rotate_rows<S::kThreads>(
            regime, head_dim, rows, false, [&](int r) { return s.query_position(p, work.token(r)); },
            [&](int r) { return GlobalRow<T>{s.query_row<T>(p.query, work.head(r), work.token(r))}; }, to);
    };
    if constexpr (S::kPacked)
        rotate([&](int r) { return SharedFloatRow{S::kRotated + static_cast<SharedAddress>(r * head_dim * 4)}; });
    else
        rotate([&, columns = Columns<kHeadDim>(p.rotation)](int r) { return QueryRow<T, kHeadDim, S>{columns, r}; });
}

// The channels of quantised keys, with their scales in shared memory; they lie dim by dim.
struct SharedChannels {
    SharedAddress scales;

    LONGROPE_DEVICE int column(int dim) const { return dim; }
    LONGROPE_DEVICE float scale(int dim) const { return load_shared<float>(scales + 4 * dim); }
};

// The channels of a tile's keys with their scales where the cache has them: shared memory has packed ones alone.
template <int kHeadDim>
class StoredChannels {
  public:
    LONGROPE_DEVICE StoredChannels(const DecodeLaunch& launch, int first, bool in_chunks)
        : columns_(launch.params.rotation), in_chunks_(in_chunks) {
        // Worked out again: registers are for other tiles.
        const DecodeWork work(launch, anew(static_cast<uint32_t>(block_index())));
        scales_ =
            key_scale(launch.params, slot_of(launch.params, Sequence(launch.params, work.b), first), work.key_head);
    }
    LONGROPE_DEVICE int column(int dim) const { return in_chunks_ ? columns_.column(dim) : dim; }
    LONGROPE_DEVICE float scale(int dim) const { return load_global(scales_ + dim); }

  private:
    Columns<kHeadDim> columns_;
    bool in_chunks_;
    const float* scales_;
};

template <class S>
using TileAngles = std::conditional_t<S::kPacked, PackedAngles<S>, TableAngles<S>>;

// The scores of a tile's keys, each way there is to rotate them; which one is the same for the whole block.
template <class T, class Q, class S>
LONGROPE_DEVICE void multiply_tile(float (&scores)[2][4], const DecodeLaunch& launch, uint32_t b, int length,
                                   const TileAngles<S>& table, bool in_table, bool in_chunks, int first, int stage) {
    const AttentionParams& p = launch.params;
    const bool interleaved = p.rotation.interleaved != 0;
    const SharedAddress scales = S::channel_scales(first % kSplitKeys);
    const auto keys = [&] {
        if constexpr (S::kQuantised)
            return QuantisedKeys<Q, S>(stage, scales);
        else
            return PlainKeys<T, S>(stage);
    };
    const bool tail = S::kQuantised && first >= length / kKeyGroup * kKeyGroup;
    if (in_table && !tail) {
        if constexpr (S::kPacked) {
            const int group = first % kSplitKeys / kKeyGroup;
            if (interleaved)
                multiply_packed<Q, S, true>(scores, table, group, stage);
            else
                multiply_packed<Q, S, false>(scores, table, group, stage);
        } else if (interleaved) {
            multiply_keys<T, S, true>(scores, keys(), table);
        } else {
            multiply_keys<T, S, false>(scores, keys(), table);
        }
        return;
    }
    const ExactAngles<S> angles(p, b, first);
    const auto scattered = [&](const auto& row_at) {
        multiply_keys_in_a_loop<T, S>(scores, ScatteredKeys<S, std::decay_t<decltype(row_at)>>(p, row_at), angles,
                                      interleaved);
    };
    using ByteTile = typename S::ByteTile;
    const ByteTile bytes{S::stage(stage)};
    if (tail || (!S::kQuantised && !in_chunks)) {
        using KeyTile = typename S::KeyTile;
        scattered([=](int r) { return SharedRow<T, KeyTile>{KeyTile{S::stage(stage)}, r}; });
    } else if constexpr (S::kPacked) {
        const StoredChannels<2 * S::kPairs> channels(launch, first, in_chunks);
        scattered(
            [=](int r) { return SharedQuantisedRow<Q, ByteTile, StoredChannels<2 * S::kPairs>>{bytes, r, channels}; });
    } else if (in_chunks) {
        multiply_keys_in_a_loop<T, S>(scores, keys(), angles, interleaved);
    } else if constexpr (S::kQuantised) {
        scattered([=](int r) { return SharedQuantisedRow<Q, ByteTile, SharedChannels>{bytes, r, {scales}}; });
    }
}

// Adds the products of the probabilities of a warp's keys with their values. Of quantised values a load brings two
// columns in a word, which go to neighbouring products: column i of product 2 c + h is then dim 16 c + 2 i + h.
template <class T, class Q, class S>
LONGROPE_DEVICE void multiply_values(float (&out)[2 * S::kSteps][4], const float (&probabilities)[2][4], int stage) {
    uint32_t weights[4];
    probabilities_left<T>(weights, probabilities[0], probabilities[1]);
    const typename S::StoredTile values{S::values(stage)};
    const int row = S::key_row(lane_index() / 8 % 2);
    uint32_t both[4], v[2];
    if constexpr (S::kQuantised) {
#pragma unroll
        for (int n = 0; n < S::kSteps / 2; ++n) {
            load_matrices_transposed(both, values.half_step(0, row, lane_index() / 16, n));
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                uint32_t low[2], high[2];
                Quantised<Q>::template widen_columns<T>(low, both[2 * c]);
                Quantised<Q>::template widen_columns<T>(high, both[2 * c + 1]);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    v[0] = low[h];
                    v[1] = high[h];
                    multiply_add<T>(out[4 * n + 2 * c + h], weights, v);
                }
            }
        }
    } else {
#pragma unroll
        for (int n = 0; n < S::kSteps; ++n) {
            load_matrices_transposed(both, values.half_step(0, row, lane_index() / 16, n));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                right_half(v, both, half);
                multiply_add<T>(out[2 * n + half], weights, v);
            }
        }
    }
}

// The warps' sums of a row become the partial result of the run.
template <class S>
LONGROPE_DEVICE void store_partial(const AttentionParams& p, const AttentionScratch& scratch, int64_t place, int rows) {
    const int head_dim = static_cast<int>(p.head_dim);
    for (int i = thread_index(); i < rows * head_dim; i += S::kThreads) {
        const int row = i / head_dim, d = i % head_dim;
        float top = -infinity(), total = 0.0f, out = 0.0f;
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) top = fmaxf(top, load_shared<float>(S::sum(w, row, S::kSumStride - 2)));
        const float shift = top == -infinity() ? 0.0f : top;
#pragma unroll
        for (int w = 0; w < S::kWarps; ++w) {
            const float keep = exp2_fast(load_shared<float>(S::sum(w, row, S::kSumStride - 2)) - shift);
            total += keep * load_shared<float>(S::sum(w, row, S::kSumStride - 1));
            out += keep * load_shared<float>(S::sum(w, row, d));
        }
        const bool seen = total != 0.0f;  // a NaN is
        if (d == 0) store_global(scratch.partial_lse + place + row, seen ? top + log2f(total) : -infinity());
        store_global(scratch.partial + (place + row) * head_dim + d, seen ? out / total : 0.0f);
    }
}

template <class T, int kHeadDim, class Q>
LONGROPE_RESIDENT_KERNEL((DecodeShape<T, kHeadDim, Q>::kThreads), (DecodeShape<T, kHeadDim, Q>::kResident))
attention_decode_kernel(const DecodeLaunch launch) {
    using S = DecodeShape<T, kHeadDim, Q>;
    const AttentionParams& p = launch.params;
    const DecodeWork work(launch, static_cast<uint32_t>(block_index()));
    const Sequence s(p, work.b);
    const int rows = work.rows(s);
    if (rows <= 0 || !decodes(p, s)) return;

    const Interval first_seen = s.visible(p, work.token(0)), last_seen = s.visible(p, work.token(rows - 1));
    const int64_t run_begin = int64_t{work.split} * kSplitKeys, run_end = run_begin + kSplitKeys;
    const int begin = static_cast<int>((first_seen.low > run_begin ? first_seen.low : run_begin) / S::kKeys * S::kKeys);
    const int64_t seen_end = last_seen.high < s.key_length ? last_seen.high : s.key_length;
    const int end = static_cast<int>(seen_end < run_end ? seen_end : run_end);
    if (begin >= end) {
        for (int r = thread_index(); r < rows; r += S::kThreads)
            store_global(launch.scratch.partial_lse + work.place + r, -infinity());
        return;
    }

    TileCopies<T, kHeadDim, Q> copies(launch, s, work.key_head, begin);
    if constexpr (S::kQuantised) copies.start_scales(static_cast<int>(run_begin), begin, end);
    copy_async_commit();
    copies.start(begin, 0);
    copy_async_commit();
    const Regime regime = regime_of(p.rotation, s.b);
    load_decode_queries<T, kHeadDim, S>(p, s, work, regime, rows);
    RunScales run{true, true};
    if constexpr (S::kQuantised) {
        copy_async_wait<1>();
        block_sync();  // the scales are there, and the rotated queries
        run = prepare_scales<T, Q, S>(regime);
        if constexpr (S::kPacked)
            run.keys = store_queries<T, Q, S>(p.rotation, static_cast<int>(p.head_dim), rows) && run.keys;
    }

    const ScoreScale& scale = launch.scale;
    const int lane_row = lane_index() / 4, lane_column = lane_index() % 4 * 2;
    float out[2 * S::kSteps][4] = {};
    float top[2] = {-infinity(), -infinity()}, total[2] = {};
    int low[2], high[2];  // of the lane's rows; rows past the last see what it sees
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane_row + 8 * r;
        const Interval seen = s.visible(p, work.token(row < rows ? row : rows - 1));
        low[r] = static_cast<int>(seen.low);
        high[r] = static_cast<int>(seen.high);
    }

    const uint32_t b = work.b;
    const int length = static_cast<int>(s.key_length);
    // Keys below are not rescaled; no tile comes after 2^31 - 1.
    const int start_tokens = static_cast<int>(regime.start_tokens < INT32_MAX ? regime.start_tokens : INT32_MAX);
    const bool in_chunks = Columns<kHeadDim>(p.rotation).move_chunks_of(8), in_range = in_chunks && run.keys;
    TileAngles<S> table;
    for (int first = begin, stage = 0; first < end; first += S::kKeys, stage ^= 1) {
        const bool below = first <= start_tokens - S::kKeys;
        const bool in_table = in_range && p.key_positions == nullptr && (below || first >= start_tokens);
        if (in_table) table.begin(p, b, below, first, stage);
        copy_async_wait<0>();
        block_sync();  // the stage is there for all, and the other one done with
        if (first + S::kKeys < end) copies.start(first + S::kKeys, stage ^ 1);
        copy_async_commit();

        float scores[2][4] = {};
        multiply_tile<T, Q, S>(scores, launch, b, length, table, in_table, in_chunks, first, stage);
        if (scale.capped()) cap_scores(scores, scale);
        if (any_lane(first < low[0] || first < low[1] || first + S::kKeys > high[0] || first + S::kKeys > high[1])) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int key = first + S::key(j, lane_column + c % 2);
                    if (key < low[c / 2] || key >= high[c / 2]) scores[j][c] = -infinity();
                }
        }
        float keep[2];
        softmax_step(scores, scale, top, total, keep);
        rescale(out, keep);
        if constexpr (S::kQuantised) {
            // Neighbouring keys lie side by side; those before the middle in falling order.
            const SharedAddress scales = S::value_scale(first % kSplitKeys);
            const Float2 before = load_shared<Float2>(scales + 4 * S::key(0, lane_column + 1));
            const Float2 after = load_shared<Float2>(scales + 4 * S::key(1, lane_column));
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                scores[0][c] *= c % 2 == 0 ? before.y : before.x;
                scores[1][c] *= c % 2 == 0 ? after.x : after.y;
            }
            if (run.values)
                multiply_values<Half, Q, S>(out, scores, stage);
            else
                multiply_values<T, Q, S>(out, scores, stage);
        } else {
            multiply_values<T, Q, S>(out, scores, stage);
        }
    }
    block_sync();  // the sums take the place of the stages

    const float value_unit = S::kQuantised ? load_shared<float>(S::kValueUnit) : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane_row + 8 * r;
        const float sum = quad_sum(total[r]);
#pragma unroll
        for (int n = 0; n < 2 * S::kSteps; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int i = lane_column + c, dim = S::kQuantised ? 16 * (n / 2) + 2 * i + n % 2 : 8 * n + i;
                store_shared(S::sum(warp_index(), row, dim), out[n][2 * r + c] * value_unit);
            }
        if (lane_column == 0) {
            store_shared(S::sum(warp_index(), row, S::kSumStride - 2), top[r]);
            store_shared(S::sum(warp_index(), row, S::kSumStride - 1), sum);
        }
    }
    block_sync();
    // Worked out again: registers are for the loop.
    const DecodeWork again(launch, anew(static_cast<uint32_t>(block_index())));
    store_partial<S>(p, launch.scratch, again.place, again.rows(Sequence(p, again.b)));
}

// The launch for a cache of Q: T where nothing is quantised.
template <class T, int kHeadDim, class Q>
void run_decode(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    using S = DecodeShape<T, kHeadDim, Q>;
    constexpr int kStep = TileCopies<T, kHeadDim, Q>::kStep;
    const int64_t size = p.pages.block_table == nullptr ? kStep + 1 : p.pages.page_tokens;
    const int32_t row_blocks = static_cast<int32_t>((scratch.rows + kBlockRows - 1) / kBlockRows);
    const DecodeLaunch arguments{p,
                                 scratch,
                                 ScoreScale(p.scale, p.softcap),
                                 ByteStrides(p.key, sizeof(Q)),
                                 ByteStrides(p.value, sizeof(Q)),
                                 static_cast<int32_t>(p.query_heads / p.key_heads),
                                 row_blocks,
                                 static_cast<uint32_t>(kStep / size),
                                 static_cast<uint32_t>(kStep % size)};
    launch(attention_decode_kernel<T, kHeadDim, Q>, p.batch * p.key_heads * scratch.splits * row_blocks, S::kThreads,
           S::kSharedBytes, arguments, stream);
}

template <class T, class Q>
void run_decode_of_width(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    if (p.head_dim <= 32) return run_decode<T, 32, Q>(p, scratch, stream);
    if (p.head_dim <= 64) return run_decode<T, 64, Q>(p, scratch, stream);
    if (p.head_dim <= 96) return run_decode<T, 96, Q>(p, scratch, stream);
    if (p.head_dim <= 128) return run_decode<T, 128, Q>(p, scratch, stream);
    return run_decode<T, 256, Q>(p, scratch, stream);
}

template <class Q>
void run_quantised_decode(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    if (p.dtype == Dtype::kFloat16) return run_decode_of_width<Half, Q>(p, scratch, stream);
    run_decode_of_width<BFloat16Bits, Q>(p, scratch, stream);
}

// Of quantised caches.
void attention_decode_int8(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);
void attention_decode_fp8(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);

}  // namespace longrope
