// Rotation of a row of head_dim elements, cut into units that share no element, so that threads can turn them in place.
//
// Where the pairs come in whole groups of 8, a unit is 8 pairs in two chunks of 16 bytes, or one chunk that passes
// through; otherwise it is one pair, or one element. Angles are the integer phases of core/phase.h, rounded once to
// fp32. A row is anything with load16, store16 (by chunk), load1 and store1 (by element).
#pragma once

#include "../core/params.h"
#include "../core/phase.h"
#include "rows.cuh"

namespace longrope {

// The tables of one sequence.
struct Regime {
    const int64_t *turns, *base_turns;
    int64_t start_tokens;
    float factor;
    int pairs;
    bool interleaved;

    LONGROPE_DEVICE bool in_chunks() const { return pairs % 8 == 0; }
    template <bool kChunks>
    LONGROPE_DEVICE int units(int head_dim) const {
        return kChunks ? head_dim / 8 - pairs / 8 : head_dim - pairs;
    }
};

LONGROPE_DEVICE Regime regime_of(const Rotation& r, int64_t b) {
    const int64_t row = load_global(r.regime_index + b);
    return {r.turns + row * r.pairs,
            r.base_turns + row * r.pairs,
            load_global(r.start_tokens + row),
            load_global(r.attention_factor + row),
            r.pairs,
            r.interleaved != 0};
}

// cos and sin of the pairs of a unit.
template <bool kChunks>
struct Angles {
    CosSin of[kChunks ? 8 : 1];
};

template <bool kChunks>
LONGROPE_DEVICE Angles<kChunks> angles_of(const Regime& regime, int unit, int64_t position, bool conjugate) {
    constexpr int kPairs = kChunks ? 8 : 1;
    Angles<kChunks> angles;
    if (unit * kPairs >= regime.pairs) return {};
    const int64_t* turns = (position < regime.start_tokens ? regime.base_turns : regime.turns) + unit * kPairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const CosSin x = cos_sin(phase_of(position, load_global(turns + i)));
        const float sine = x.sin * regime.factor;
        angles.of[i] = {x.cos * regime.factor, conjugate ? -sine : sine};
    }
    return angles;
}

LONGROPE_DEVICE Float2 turned(float a, float b, const CosSin& angle) {
    return {a * angle.cos - b * angle.sin, b * angle.cos + a * angle.sin};
}

template <class From, class To>
LONGROPE_DEVICE void rotate_unit(const Regime& regime, int unit, const Angles<true>& angles, const From& from,
                                 const To& to) {
    const int groups = regime.pairs / 8;
    if (unit >= groups) {
        const int chunk = unit + groups;
        to.store8(chunk, from.load8(chunk));
        return;
    }
    const int first = regime.interleaved ? 2 * unit : unit;
    const int second = regime.interleaved ? first + 1 : unit + groups;
    Float8 a = from.load8(first), b = from.load8(second);
    if (regime.interleaved) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Float2 x = turned(a.at[2 * i], a.at[2 * i + 1], angles.of[i]);
            const Float2 y = turned(b.at[2 * i], b.at[2 * i + 1], angles.of[4 + i]);
            a.at[2 * i] = x.x;
            a.at[2 * i + 1] = x.y;
            b.at[2 * i] = y.x;
            b.at[2 * i + 1] = y.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const Float2 x = turned(a.at[i], b.at[i], angles.of[i]);
            a.at[i] = x.x;
            b.at[i] = x.y;
        }
    }
    to.store8(first, a);
    to.store8(second, b);
}

template <class From, class To>
LONGROPE_DEVICE void rotate_unit(const Regime& regime, int unit, const Angles<false>& angles, const From& from,
                                 const To& to) {
    if (unit >= regime.pairs) {
        const int dim = unit + regime.pairs;
        to.store1(dim, from.load1(dim));
        return;
    }
    const int first = regime.interleaved ? 2 * unit : unit;
    const int second = regime.interleaved ? first + 1 : unit + regime.pairs;
    const Float2 x = turned(from.load1(first), from.load1(second), angles.of[0]);
    to.store1(first, x.x);
    to.store1(second, x.y);
}

// Rotates rows [0, count) by kThreads threads, in units: `position_of(r)`, `from(r)` and `to(r)` say the rest.
template <bool kChunks, int kThreads, class PositionOf, class From, class To>
LONGROPE_DEVICE void rotate_rows_in(const Regime& regime, int head_dim, int count, bool conjugate,
                                    const PositionOf& position_of, const From& from, const To& to, int thread) {
    const int units = regime.units<kChunks>(head_dim);
    for (int i = thread; i < count * units; i += kThreads) {
        const int row = i / units, unit = i % units;
        rotate_unit(regime, unit, angles_of<kChunks>(regime, unit, position_of(row), conjugate), from(row), to(row));
    }
}

template <int kThreads, class PositionOf, class From, class To>
LONGROPE_DEVICE void rotate_rows(const Regime& regime, int head_dim, int count, bool conjugate,
                                 const PositionOf& position_of, const From& from, const To& to,
                                 int thread = thread_index()) {
    if (regime.in_chunks())
        rotate_rows_in<true, kThreads>(regime, head_dim, count, conjugate, position_of, from, to, thread);
    else
        rotate_rows_in<false, kThreads>(regime, head_dim, count, conjugate, position_of, from, to, thread);
}

}  // namespace longrope
