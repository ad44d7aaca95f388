// What the backward kernels for Hopper do with accumulators: from products to P and dS, and from sums to gradients that
// are rotated back.
#pragma once

#include "../queries.cuh"
#include "../softmax.cuh"
#include "pipeline.cuh"

namespace longrope {

// Two operands of which the same rows come together: queries and grad_out, or keys and values.
template <class TileT>
struct TilePair {
    using Tile = TileT;
    static constexpr int kRows = TileT::kRows, kBytes = 2 * TileT::kBytes;

    SharedAddress base;

    LONGROPE_DEVICE TileT first() const { return {base}; }
    LONGROPE_DEVICE TileT second() const { return {base + TileT::kBytes}; }
    LONGROPE_DEVICE TileT of(bool is_first) const { return is_first ? first() : second(); }
};

// Which columns a lane's two rows of accumulators see, in shared memory because registers are short.
template <int kApart>
struct SeenColumns {
    SharedAddress slot;  // 8 bytes for the lane's first row; those for the other are kApart further

    LONGROPE_DEVICE void put(int r, const Interval& seen) const {
        store_shared(slot + kApart * r, Vec8{{static_cast<uint32_t>(seen.low), static_cast<uint32_t>(seen.high)}});
    }
    // Zeros where a row does not see a column of the tile that begins at column `first`.
    template <int kTiles, class... More>
    LONGROPE_DEVICE void mask(int first, float (&x)[kTiles][4], More&... more) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Vec8 seen = load_shared<Vec8>(slot + kApart * r);
            const int low = static_cast<int>(seen.word[0]) - first, high = static_cast<int>(seen.word[1]) - first;
            if (low <= 0 && high >= 8 * kTiles) continue;
            mask_scores(x, r, low, high, 0.0f);
            (mask_scores(more, r, low, high, 0.0f), ...);
        }
    }
};

// What is known of the rows of a thread's four accumulators in a tile of 8 columns.
struct KnownRows {
    float lse[4];    // in units of log 2
    float delta[4];  // times the scale of the scores
};

// P of a product q k^T. `slope` is multiplied by what the softcap leaves of the score's slope, where there is one.
template <bool kCapped>
LONGROPE_DEVICE float probability(float product, float lse_log2, const ScoreScale& scale, float& slope) {
    if constexpr (kCapped) {
        const float bounded = tanh_fast(product * scale.cap_slope);
        slope *= 1.0f - bounded * bounded;
        return exp2_fast(bounded * scale.cap_log2 - lse_log2);
    } else {
        return exp2_fast(product * scale.scale_log2 - lse_log2);
    }
}

// Turns q k^T into P and dO v^T into dS, as they would be without a mask; `known(j)` are the rows of tile j.
template <bool kCapped, int kTiles, class Known>
LONGROPE_DEVICE void turn_tiles_into_gradients(float (&scores)[kTiles][4], float (&slopes)[kTiles][4],
                                               const ScoreScale& scale, float factor, const Known& known) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const KnownRows rows = known(j);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float slope = slopes[j][c] * factor - rows.delta[c];
            scores[j][c] = probability<kCapped>(scores[j][c], rows.lse[c], scale, slope);
            slopes[j][c] = scores[j][c] * slope;
        }
    }
}

template <int kTiles, class Known>
LONGROPE_DEVICE void turn_into_gradients(float (&scores)[kTiles][4], float (&slopes)[kTiles][4],
                                         const ScoreScale& scale, float factor, const Known& known) {
    if (scale.capped())
        turn_tiles_into_gradients<true>(scores, slopes, scale, factor, known);
    else
        turn_tiles_into_gradients<false>(scores, slopes, scale, factor, known);
}

// Accumulators as the left operands of the next product, 16 columns each.
template <class T, int kSteps>
LONGROPE_DEVICE void pack_left(uint32_t (&left)[kSteps][4], const float (&x)[2 * kSteps][4]) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) probabilities_left<T>(left[j], x[2 * j], x[2 * j + 1]);
}

// Releases the tiles of a ring that come `kCount` at a time, as soon as the product with each is done: the last groups
// in flight are one for each of them, and `kAfter` others.
template <int kCount, int kAfter, int kNext = 0, class RingT>
LONGROPE_DEVICE void release_multiplied(const RingT& ring, int count) {
    if constexpr (kNext < kCount) {
        group_wait<kCount - 1 - kNext + kAfter>();
        ring.release(count * kCount + kNext);
        release_multiplied<kCount, kAfter, kNext + 1>(ring, count);
    }
}

// One of 8 rows of sums in fp32, of which a row's chunks of 8 are permuted by the row: then neither the accumulators on
// their way there nor whole rows on their way out meet in a bank.
struct SumRow {
    SharedAddress base;  // of the row
    int row;

    LONGROPE_DEVICE SharedAddress element(int dim) const { return base + ((dim / 8 ^ row % 4) * 8 + dim % 8) * 4; }
    LONGROPE_DEVICE Float8 load8(int chunk) const {
        const Float4 low = load_shared<Float4>(element(8 * chunk)), high = load_shared<Float4>(element(8 * chunk + 4));
        return {{low.at[0], low.at[1], low.at[2], low.at[3], high.at[0], high.at[1], high.at[2], high.at[3]}};
    }
    LONGROPE_DEVICE float load1(int dim) const { return load_shared<float>(element(dim)); }
};

// The sums of a warpgroup's 64 rows on their way to memory: by way of a tile of 64 rows of 16 bits that nothing else
// uses any more, 8 rows of a warp at a time. `count` rows of the group exist.
template <class TileT>
struct GradientRows {
    TileT through;
    int group, count;

    LONGROPE_DEVICE static int warp() { return warp_index() % kGroupWarps; }
    LONGROPE_DEVICE static int first(int half) { return 16 * warp() + 8 * half; }  // row of the group
    LONGROPE_DEVICE int count_of(int half) const {
        const int left = count - first(half);
        return left < 0 ? 0 : left < 8 ? left : 8;
    }
    LONGROPE_DEVICE SharedAddress of_warp(int w) const { return through.base + w * (TileT::kBytes / kGroupWarps); }
    LONGROPE_DEVICE SumRow row(int r) const { return {of_warp(warp()) + r * (TileT::kChunks * kChunk * 4), r}; }

    // Rotates the rows back, stores them to `to(r)`, and calls `then(half)` while 8 rows are at hand.
    template <int kTiles, class PositionOf, class To, class Then>
    LONGROPE_DEVICE void store(const float (&sums)[kTiles][4], const Regime& regime, int head_dim,
                               const PositionOf& position_of, const To& to, const Then& then) const {
        static_assert(8 * kTiles <= TileT::kChunks * kChunk, "rows of sums are as wide as the tile");
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            warp_sync();  // the rows before have left
            const SumRow mine = row(lane_index() / 4);
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
                store_shared(mine.element(8 * n + lane_index() % 4 * 2),
                             Float2{sums[n][2 * half], sums[n][2 * half + 1]});
            warp_sync();
            const int at = first(half);
            rotate_rows<32>(
                regime, head_dim, count_of(half), true, [&](int r) { return position_of(at + r); },
                [&](int r) { return row(r); }, [&](int r) { return to(at + r); }, lane_index());
            then(half);
        }
    }

    // The same, and the group's part in the gradient of the frequencies to `part`, where that is not null: the sum of
    // p (a db - b da) over its rows, by pair; (a, b) of the rows `rotated(r)`.
    template <int kTiles, class Rotated, class PositionOf, class To>
    LONGROPE_DEVICE void store_with_frequencies(const float (&sums)[kTiles][4], const Regime& regime, int head_dim,
                                                const Rotated& rotated, double* part, const PositionOf& position_of,
                                                const To& to) const {
        constexpr int kPairs = (kTiles * 4 + 31) / 32;  // of a lane
        double cross[kPairs] = {};
        store(sums, regime, head_dim, position_of, to, [&](int half) {
            if (part == nullptr) return;
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                const int pair = 32 * i + lane_index();
                if (pair >= regime.pairs) continue;
                const int a = regime.interleaved ? 2 * pair : pair;
                const int b = regime.interleaved ? a + 1 : pair + regime.pairs;
                for (int r = 0; r < count_of(half); ++r) {
                    const int64_t position = position_of(first(half) + r);
                    if (position < regime.start_tokens) continue;
                    const auto x = rotated(first(half) + r);
                    const SumRow grad = row(r);
                    cross[i] += static_cast<double>(position) * (static_cast<double>(x.load1(a)) * grad.load1(b) -
                                                                 static_cast<double>(x.load1(b)) * grad.load1(a));
                }
            }
        });
        if (part == nullptr) return;
        warp_sync();
#pragma unroll
        for (int i = 0; i < kPairs; ++i) store_shared(of_warp(warp()) + 8 * (32 * i + lane_index()), cross[i]);
        group_sync(group);  // the parts of the warps are there
        const int pair = thread_index() % kGroupThreads;
        if (count > 0 && pair < regime.pairs) {
            double sum = 0.0;
#pragma unroll
            for (int w = 0; w < kGroupWarps; ++w) sum += load_shared<double>(of_warp(w) + 8 * pair);
            store_global(part + pair, sum);
        }
    }
};

}  // namespace longrope
