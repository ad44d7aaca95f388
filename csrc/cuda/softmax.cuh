// The online softmax on score fragments of 16 rows, as multiply_add leaves them.
//
// A lane holds rows lane / 4 and lane / 4 + 8; the four lanes of a quad share them. `top` is the running maximum of
// scores in units of log 2, the same in the whole quad; `total` is the lane's own part of the running sum.
#pragma once

#include <cmath>

#include "../core/host_device.h"
#include "primitives.cuh"

namespace longrope {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

LONGROPE_DEVICE float infinity() {
    return __builtin_inff();
}

// Of a quad.
LONGROPE_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
LONGROPE_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Of a warp.
LONGROPE_DEVICE float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, shuffle_xor(x, lane));
    return x;
}

// tanh to a few units in the last place of 1: 1 - 2 / (1 + e^2|x|), and its series where that cancels.
LONGROPE_DEVICE float tanh_fast(float x) {
    const float magnitude = x < 0.0f ? -x : x, square = x * x;
    const float far = 1.0f - divide_fast(2.0f, 1.0f + exp2_fast(magnitude * (2.0f * kLog2E)));
    const float near = magnitude * (1.0f + square * (-0.33333333f + square * (0.13333333f + square * (-0.053968254f))));
    const float y = magnitude < 0.15f ? near : far;
    return x < 0.0f ? -y : y;
}

// How a raw product becomes a score in units of log 2.
struct ScoreScale {
    float scale_log2;           // without a softcap
    float cap_slope, cap_log2;  // with one: tanh(x * cap_slope) * cap_log2

    LONGROPE_HOST_DEVICE ScoreScale(float scale, float softcap)
        : scale_log2(softcap > 0.0f ? 1.0f : scale * kLog2E),
          cap_slope(softcap > 0.0f ? scale / softcap : 0.0f),
          cap_log2(softcap * kLog2E) {}
    LONGROPE_DEVICE bool capped() const { return cap_slope != 0.0f; }
};

template <int kColumnTiles>
LONGROPE_DEVICE void cap_scores(float (&scores)[kColumnTiles][4], const ScoreScale& scale) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[j][c] = tanh_fast(scores[j][c] * scale.cap_slope) * scale.cap_log2;
}

// The lane's row r sees columns [low, high) alone; the others become `unseen`.
template <int kColumnTiles>
LONGROPE_DEVICE void mask_scores(float (&scores)[kColumnTiles][4], int r, int low, int high,
                                 float unseen = -infinity()) {
    const int column = lane_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = 8 * j + column + c;
            if (at < low || at >= high) scores[j][2 * r + c] = unseen;
        }
}

// Scores become probabilities in place, and `keep[r]` is what multiplies all that was summed before.
template <int kColumnTiles>
LONGROPE_DEVICE void softmax_step(float (&scores)[kColumnTiles][4], const ScoreScale& scale, float (&top)[2],
                                  float (&total)[2], float (&keep)[2]) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < kColumnTiles; ++j) most = fmaxf(most, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
        const float now = fmaxf(top[r], quad_max(most) * scale.scale_log2);
        shift[r] = now == -infinity() ? 0.0f : now;
        keep[r] = exp2_fast(top[r] - shift[r]);
        top[r] = now;
        total[r] *= keep[r];
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            scores[j][c] = exp2_fast(scores[j][c] * scale.scale_log2 - shift[c / 2]);
            total[c / 2] += scores[j][c];
        }
}

// Multiplies a warp's sums by `keep`. Seldom after the first tiles: a product with 1 changes nothing.
template <int kTiles>
LONGROPE_DEVICE void rescale(float (&sums)[kTiles][4], const float (&keep)[2]) {
    if (!any_lane(!(keep[0] == 1.0f && keep[1] == 1.0f))) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[n][c] *= keep[c / 2];
}

// Probabilities of 16 columns as the left operand of the product with the values.
template <class T>
LONGROPE_DEVICE void probabilities_left(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
    a[0] = pack<T>(first[0], first[1]);
    a[1] = pack<T>(first[2], first[3]);
    a[2] = pack<T>(second[0], second[1]);
    a[3] = pack<T>(second[2], second[3]);
}

}  // namespace longrope
