// Attention of few rows over many keys, for Ampere and newer: split keys, cached before rotation, contiguous or paged,
// in the dtype of the query, int8 or fp8.
//
// A block takes one run of 512 keys of one (sequence, key head) and up to 16 rows: the query heads that share the key
// head, times a few tokens. Tiles of keys and values arrive two deep; the block rotates a tile's keys in shared memory
// (and widens a quantised tile on the way), then every warp takes 16 keys: scores, its own online softmax, its own sum
// of values. At the end the warps' sums become one partial result, which attention_combine adds to the others.
//
// Bytes: keys and values once (4 head_dim a key in 16 bits, 2 head_dim and the scales in 8), partial results 2 parts
// in 100 of them. Operations: rotation about 35 per pair and key, on the fp32 units (at head_dim 128 some 18 cycles of
// a multiprocessor a key, beside 34 to 50 that its bytes take from memory); the products are 1 part in 16 of what the
// tensor cores could do. Bound by memory; a quantised cache as much by the rotation.
//
// A quantised key is widened by its channel's scale before it is rotated; the scale of a value multiplies its
// probability, so that the product takes int8 and fp8 values as they are, which is exact in 16 bits. The scale is
// small, 1/127 or 1/448 of a row's largest value, and a probability times that would be subnormal in fp16 where it
// still counts: both are taken 128 or 256 times as large, and the sum as much smaller.
#include "../kernels.h"
#include "../queries.cuh"
#include "../softmax.cuh"

namespace longrope {
namespace {

struct DecodeLaunch {
    AttentionParams params;
    AttentionScratch scratch;
};

template <int kHeadDim, bool kQuantised>
struct Shape {
    static constexpr int kKeys = kHeadDim <= 128 ? 64 : 32, kWarps = kKeys / 16, kThreads = 32 * kWarps;
    static constexpr int kSteps = kHeadDim / 16;
    using QueryTile = Tile<kDecodeRows, kHeadDim>;
    using KeyTile = Tile<kKeys, kHeadDim>;

    // A stage: keys (quantised ones fill half of their place), values, scales of channels and of values.
    static constexpr int kValueBytes = kQuantised ? kKeys * kHeadDim : KeyTile::kBytes;
    static constexpr int kScaleBytes = kQuantised ? (kHeadDim + kKeys) * 4 : 0;
    static constexpr int kStageBytes = KeyTile::kBytes + kValueBytes + kScaleBytes;
    static constexpr int kStages = QueryTile::kBytes, kWork = kStages + 2 * kStageBytes;
    static constexpr int kSharedBytes = kWork + (kQuantised ? 2 * KeyTile::kBytes : 0);
    // The warps' sums, in the place of the stages: fp32 [warps][16][head_dim + 2].
    static constexpr int kSumStride = kHeadDim + 2;
    static_assert(kWarps * kDecodeRows * kSumStride * 4 <= kSharedBytes - kStages, "the sums do not fit the stages");
    static_assert(kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");
    static_assert(kSplitKeys % kKeys == 0 && kKeyGroup % kKeys == 0, "a tile lies in one run and one group");

    static LONGROPE_DEVICE SharedAddress stage(int i) { return kStages + i * kStageBytes; }
    static LONGROPE_DEVICE SharedAddress values(int i) { return stage(i) + KeyTile::kBytes; }
    static LONGROPE_DEVICE SharedAddress channel_scales(int i) { return values(i) + kValueBytes; }
    static LONGROPE_DEVICE SharedAddress value_scales(int i) { return channel_scales(i) + 4 * kHeadDim; }
    static LONGROPE_DEVICE SharedAddress sum(int warp, int row, int column) {
        return kStages + ((warp * kDecodeRows + row) * kSumStride + column) * 4;
    }
};

// By what probabilities are larger, a power of two; 1 where values come as they are.
template <class T, class Q>
constexpr float kProbabilityUnit = std::is_same_v<Q, T>     ? 1.0f
                                   : std::is_same_v<Q, Fp8> ? 256.0f
                                                            : 128.0f;

// Starts copying `count` rows of bytes, [rows][head_dim] as they are; zeros below.
template <class S, int kHeadDim, class RowAt>
LONGROPE_DEVICE void copy_bytes(SharedAddress to, int count, int head_dim, const RowAt& row_at) {
    constexpr int kChunks = kHeadDim / kChunk;
    for (int i = thread_index(); i < S::kKeys * kChunks; i += S::kThreads) {
        const int row = i / kChunks, c = i % kChunks;
        const bool valid = row < count && c * kChunk < head_dim;
        const uint8_t* from = row_at(valid ? row : 0);
        copy_async<8>(to + row * kHeadDim + c * kChunk, valid ? from + c * kChunk : from, valid);
    }
}

// Starts copying the tile of keys [first, first + kKeys), and what belongs to it, into a stage.
template <class T, int kHeadDim, bool kQuantised, class S>
LONGROPE_DEVICE void copy_stage(const AttentionParams& p, const Sequence& s, int64_t head, int first, int stage) {
    const int head_dim = static_cast<int>(p.head_dim), left = static_cast<int>(s.key_length) - first;
    const typename S::KeyTile keys{S::stage(stage)};
    if constexpr (!kQuantised) {
        const auto rows_of = [&](const Operand& x) {
            return [&](int r) {
                const Slot slot = slot_of(p, s, first + r);
                return row_of<T>(x, slot.outer, head, slot.token);
            };
        };
        copy_tile<S::kThreads>(keys, left, head_dim, rows_of(p.key));
        copy_tile<S::kThreads>(typename S::KeyTile{S::values(stage)}, left, head_dim, rows_of(p.value));
    } else {
        const auto rows_of = [&](const Operand& x) {
            return [&](int r) {
                const Slot slot = slot_of(p, s, first + r);
                return static_cast<const uint8_t*>(row_of<uint8_t>(x, slot.outer, head, slot.token));
            };
        };
        copy_bytes<S, kHeadDim>(S::values(stage), left, head_dim, rows_of(p.value));
        for (int i = thread_index(); i < S::kKeys; i += S::kThreads)
            copy_async<4>(S::value_scales(stage) + 4 * i,
                          value_scale(p, slot_of(p, s, first + (i < left ? i : 0)), head), i < left);
        if (first >= quantised_keys(s)) {
            copy_tile<S::kThreads>(keys, left, head_dim, [&](int r) {
                return row_of<T>(p.pages.key_tail, s.b, head, (first + r) % kKeyGroup);
            });
        } else {
            copy_bytes<S, kHeadDim>(keys.base, left, head_dim, rows_of(p.key));
            const float* scales = key_scale(p, slot_of(p, s, first), head);
            for (int i = thread_index(); i < head_dim / 4; i += S::kThreads)
                copy_async<16>(S::channel_scales(stage) + 16 * i, scales + 4 * i, true);
        }
    }
}

// Rotates the keys of a stage; a quantised stage is widened into the work tiles. Keys past the end are zeros and stay
// so.
template <class T, int kHeadDim, class Q, class S>
LONGROPE_DEVICE void prepare_stage(const AttentionParams& p, const Sequence& s, const Regime& regime, int first,
                                   int stage, typename S::KeyTile keys, typename S::KeyTile values) {
    using Row = SharedRow<T, typename S::KeyTile>;
    const typename S::KeyTile raw{S::stage(stage)};
    const int head_dim = static_cast<int>(p.head_dim), last = static_cast<int>(s.key_length) - 1;
    const auto position_of = [&](int r) { return s.key_position(p, first + r < last ? first + r : last); };
    const auto to = [&](int r) { return Row{keys, r}; };
    const auto rotate = [&](const auto& from) {
        rotate_rows<S::kThreads>(regime, head_dim, S::kKeys, false, position_of, from, to);
    };
    if constexpr (std::is_same_v<Q, T>) {
        rotate([&](int r) { return Row{raw, r}; });
    } else {
        if (first >= quantised_keys(s))
            rotate([&](int r) { return Row{raw, r}; });
        else
            rotate([&](int r) { return SharedQuantisedRow<Q>{raw.base + r * kHeadDim, S::channel_scales(stage)}; });
        for (int i = thread_index(); i < S::kKeys * (kHeadDim / kChunk); i += S::kThreads) {
            const int row = i / (kHeadDim / kChunk), c = i % (kHeadDim / kChunk);
            const Vec8 bytes = load_shared<Vec8>(S::values(stage) + row * kHeadDim + c * kChunk);
            store_shared(values.chunk(row, c), Quantised<Q>::template widen8<T>(bytes));
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

// Q: what keys and values are stored as; T: nothing is quantised.
template <class T, int kHeadDim, class Q>
LONGROPE_KERNEL((Shape<kHeadDim, !std::is_same_v<Q, T>>::kThreads))
attention_decode_kernel(const DecodeLaunch launch) {
    constexpr bool kQuantised = !std::is_same_v<Q, T>;
    constexpr float kUnit = kProbabilityUnit<T, Q>;
    using S = Shape<kHeadDim, kQuantised>;
    const AttentionParams& p = launch.params;
    const int64_t split = block_index() % launch.scratch.splits;
    const int64_t head = block_index() / launch.scratch.splits % p.key_heads;
    const Sequence s(p, block_index() / launch.scratch.splits / p.key_heads);
    const RowMap map(p, head);
    const int rows = static_cast<int>(s.query_count * map.group);
    if (rows == 0 || !decodes(p, s)) return;
    const int64_t place = ((s.b * p.key_heads + head) * launch.scratch.splits + split) * launch.scratch.rows;

    const Interval first_seen = s.visible(p, 0), last_seen = s.visible(p, map.token(rows - 1));
    const int64_t run_begin = split * kSplitKeys, run_end = run_begin + kSplitKeys;
    const int begin = static_cast<int>((first_seen.low > run_begin ? first_seen.low : run_begin) / S::kKeys * S::kKeys);
    const int64_t seen_end = last_seen.high < s.key_length ? last_seen.high : s.key_length;
    const int end = static_cast<int>(seen_end < run_end ? seen_end : run_end);
    if (begin >= end) {
        for (int r = thread_index(); r < rows; r += S::kThreads)
            store_global(launch.scratch.partial_lse + place + r, -infinity());
        return;
    }

    const typename S::QueryTile queries{0};
    copy_stage<T, kHeadDim, kQuantised, S>(p, s, head, begin, 0);
    copy_async_commit();
    load_queries<T, S::kThreads>(p, s, map, 0, rows, queries);
    if constexpr (kQuantised) {
        // Columns past head_dim of the work tiles: what is rotated does not reach them.
        const typename S::KeyTile keys{S::kWork};
        for (int i = thread_index(); i < S::kKeys * S::KeyTile::kChunks; i += S::kThreads)
            if (i % S::KeyTile::kChunks * kChunk >= p.head_dim)
                store_shared(keys.chunk(i / S::KeyTile::kChunks, i % S::KeyTile::kChunks), Vec16{});
    }
    block_sync();

    const Regime regime = regime_of(p.rotation, s.b);
    const ScoreScale scale(p.scale, p.softcap);
    const int lane_row = lane_index() / 4, warp_key = 16 * warp_index();
    float out[2 * S::kSteps][4] = {};
    float top[2] = {-infinity(), -infinity()}, total[2] = {};
    int low[2], high[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane_row + 8 * r;
        const Interval seen = row < rows ? s.visible(p, map.token(row)) : Interval{0, 0};
        low[r] = static_cast<int>(seen.low);
        high[r] = static_cast<int>(seen.high);
    }

    for (int first = begin, stage = 0; first < end; first += S::kKeys, stage ^= 1) {
        if (first + S::kKeys < end) copy_stage<T, kHeadDim, kQuantised, S>(p, s, head, first + S::kKeys, stage ^ 1);
        copy_async_commit();
        copy_async_wait<1>();
        block_sync();  // the stage is there for all
        const typename S::KeyTile keys{kQuantised ? S::kWork : S::stage(stage)};
        const typename S::KeyTile values{kQuantised ? S::kWork + S::KeyTile::kBytes : S::values(stage)};
        prepare_stage<T, kHeadDim, Q, S>(p, s, regime, first, stage, keys, values);
        block_sync();  // the keys are rotated for all

        float scores[2][4] = {};
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) {
            uint32_t q[4], both[4], k[2];
            load_left(q, queries, 0, step);
            load_right(both, keys, warp_key, step);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                right_half(k, both, half);
                multiply_add<T>(scores[half], q, k);
            }
        }
        if (scale.capped()) cap_scores(scores, scale);
        float keep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) mask_scores(scores, r, low[r] - first - warp_key, high[r] - first - warp_key);
        softmax_step(scores, scale, top, total, keep);
        if constexpr (kQuantised) {
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    scores[j][c] *= kUnit * load_shared<float>(S::value_scales(stage) +
                                                               4 * (warp_key + 8 * j + lane_index() % 4 * 2 + c % 2));
        }
#pragma unroll
        for (int n = 0; n < 2 * S::kSteps; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) out[n][c] *= keep[c / 2];
        uint32_t weights[4];
        probabilities_left<T>(weights, scores[0], scores[1]);
#pragma unroll
        for (int n = 0; n < S::kSteps; ++n) {
            uint32_t both[4], v[2];
            load_right_transposed(both, values, warp_key, n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                right_half(v, both, half);
                multiply_add<T>(out[2 * n + half], weights, v);
            }
        }
        block_sync();  // the stage and the work tiles are done with
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane_row + 8 * r, column = lane_index() % 4 * 2;
        const float sum = quad_sum(total[r]);
#pragma unroll
        for (int n = 0; n < 2 * S::kSteps; ++n) {
            store_shared(S::sum(warp_index(), row, 8 * n + column), out[n][2 * r] / kUnit);
            store_shared(S::sum(warp_index(), row, 8 * n + column + 1), out[n][2 * r + 1] / kUnit);
        }
        if (column == 0) {
            store_shared(S::sum(warp_index(), row, S::kSumStride - 2), top[r]);
            store_shared(S::sum(warp_index(), row, S::kSumStride - 1), sum);
        }
    }
    block_sync();
    store_partial<S>(p, launch.scratch, place, rows);
}

template <class T, int kHeadDim>
void run(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    const int64_t blocks = p.batch * p.key_heads * scratch.splits;
    const DecodeLaunch arguments{p, scratch};
    const auto of = [&](auto q) {
        using Q = decltype(q);
        using S = Shape<kHeadDim, !std::is_same_v<Q, T>>;
        launch(attention_decode_kernel<T, kHeadDim, Q>, blocks, S::kThreads, S::kSharedBytes, arguments, stream);
    };
    if (p.pages.key_scale == nullptr) return of(T{});
    if (p.pages.stored == Stored::kFp8) return of(Fp8{});
    of(int8_t{});
}

template <class T>
void run_of_width(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    if (p.head_dim <= 32) return run<T, 32>(p, scratch, stream);
    if (p.head_dim <= 64) return run<T, 64>(p, scratch, stream);
    if (p.head_dim <= 96) return run<T, 96>(p, scratch, stream);
    if (p.head_dim <= 128) return run<T, 128>(p, scratch, stream);
    return run<T, 256>(p, scratch, stream);
}

}  // namespace

void attention_decode_sm80(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_of_width<Half>(params, scratch, stream);
    run_of_width<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
