// What the backward kernels for Ampere and newer share: rows and keys on their way into shared memory, the products, P
// of a score, and the sums on their way out.
#pragma once

#include "../kernels.h"
#include "../queries.cuh"
#include "../softmax.cuh"

namespace longrope {

struct BackwardLaunch {
    AttentionBackwardParams params;
    BackwardScratch scratch;
};

// Gradients at head_dim above 128 (attention_backward_wide.cu), after attention_delta.
void attention_backward_wide_sm80(const BackwardLaunch& launch, Stream stream);

// P of a score that is seen. `slope` becomes by how much more the score moves than the product that it comes of: the
// scale to begin with, less where the softcap bends it.
LONGROPE_DEVICE float probability(float score, float lse_log2, const ScoreScale& scale, float& slope) {
    if (scale.capped()) {
        const float bounded = tanh_fast(score * scale.cap_slope);
        slope *= 1.0f - bounded * bounded;
        return exp2_fast(bounded * scale.cap_log2 - lse_log2);
    }
    return exp2_fast(score * scale.scale_log2 - lse_log2);
}

// 16 rows times right^T: as many columns of sums as `right` has rows; `left(a, step)` brings the operand.
template <class T, int kSteps, int kTiles, class RightTile, class Left>
LONGROPE_DEVICE void multiply_rows(float (&sums)[kTiles][4], RightTile right, const Left& left) {
    static_assert(8 * kTiles == RightTile::kRows, "a column of sums for every row");
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4], both[4], b[2];
        left(a, step);
#pragma unroll
        for (int j = 0; j < kTiles / 2; ++j) {
            load_right(both, right, 16 * j, step);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                right_half(b, both, half);
                multiply_add<T>(sums[2 * j + half], a, b);
            }
        }
    }
}

// 16 rows, of as many columns as `right` has rows, times its columns from 16 first_step on; `left(a, j)` brings columns
// 16 j and on.
template <class T, int kTiles, class RightTile, class Left>
LONGROPE_DEVICE void multiply_weights(float (&sums)[kTiles][4], RightTile right, int first_step, const Left& left) {
#pragma unroll
    for (int j = 0; j < RightTile::kRows / 16; ++j) {
        uint32_t a[4];
        left(a, j);
#pragma unroll
        for (int n = 0; n < kTiles / 2; ++n) {
            uint32_t both[4], b[2];
            load_right_transposed(both, right, 16 * j, first_step + n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                right_half(b, both, half);
                multiply_add<T>(sums[2 * n + half], a, b);
            }
        }
    }
}

// Starts copying the rows of a block, or zeros, from an operand like the query.
template <class T, int kThreads, class TileT>
LONGROPE_DEVICE void copy_rows(const Operand& x, const Sequence& s, const RowMap& map, int64_t first, int count,
                               TileT tile, int head_dim) {
    copy_tile<kThreads>(tile, count, head_dim, [&](int r) {
        return static_cast<const T*>(s.query_row<T>(x, map.head(first + r), map.token(first + r)));
    });
}

template <class T, int kThreads, class TileT>
LONGROPE_DEVICE void copy_keys(const Operand& x, const Sequence& s, int64_t head, int first, TileT tile, int head_dim) {
    const T* base = row_of<T>(x, s.b, head, s.key_start + first);
    copy_tile<kThreads>(tile, static_cast<int>(s.key_length) - first, head_dim,
                        [&](int r) { return base + r * x.token_stride; });
}

// A warp's sums of 16 rows to fp32 rows of `width` in shared memory, from a row and a column on.
template <int kTiles>
LONGROPE_DEVICE void spread_sums(SharedAddress to, const float (&sums)[kTiles][4], int first_row, int width,
                                 int first_column = 0) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int row = first_row + lane_index() / 4 + c / 2 * 8;
            store_shared(to + (row * width + first_column + 8 * n + lane_index() % 4 * 2 + c % 2) * 4, sums[n][c]);
        }
}

// The part of a block in the gradient of the frequencies: sum of p (a db - b da) over its rows, by pair; (a, b) of the
// rotated rows, (da, db) of fp32 rows of `width` in shared memory.
template <int kThreads, class RotatedRow, class PositionOf>
LONGROPE_DEVICE void store_frequency_part(const Regime& regime, SharedAddress grads, int width, int count, double* part,
                                          const RotatedRow& rotated, const PositionOf& position_of) {
    for (int pair = thread_index(); pair < regime.pairs; pair += kThreads) {
        const int first = regime.interleaved ? 2 * pair : pair;
        const int second = regime.interleaved ? first + 1 : pair + regime.pairs;
        double sum = 0.0;
        for (int r = 0; r < count; ++r) {
            const int64_t position = position_of(r);
            if (position < regime.start_tokens) continue;
            const auto row = rotated(r);
            const SharedFloatRow grad{grads + r * width * 4};
            const double cross = static_cast<double>(row.load1(first)) * grad.load1(second) -
                                 static_cast<double>(row.load1(second)) * grad.load1(first);
            sum += static_cast<double>(position) * cross;
        }
        store_global(part + pair, sum);
    }
}

}  // namespace longrope
