// Rotation of a row of head_dim elements, cut into units that share no element, so that threads can turn them in place.
//
// Where the pairs come in whole groups of 8, a unit is 8 pairs in two chunks of 16 bytes, or one chunk that passes
// through; otherwise it is one pair, or one element. Angles are the integer phases of core/phase.h, rounded once to
// fp32. A row is anything with load16, store16 (by chunk), load1 and store1 (by element).
#pragma once

#include "../core/params.h"
#include "../core/phase.h"
#include "primitives.cuh"

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

template <class T, class From, class To>
LONGROPE_DEVICE void rotate_unit(const Regime& regime, int unit, const Angles<true>& angles, const From& from,
                                 const To& to) {
    const int groups = regime.pairs / 8;
    if (unit >= groups) {
        const int chunk = unit + groups;
        to.store16(chunk, from.load16(chunk));
        return;
    }
    const int first = regime.interleaved ? 2 * unit : unit;
    const int second = regime.interleaved ? first + 1 : unit + groups;
    Vec16 a = from.load16(first), b = from.load16(second);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Float2 x = unpack<T>(a.word[i]), y = unpack<T>(b.word[i]);
        if (regime.interleaved) {
            const Float2 u = turned(x.x, x.y, angles.of[i]), v = turned(y.x, y.y, angles.of[4 + i]);
            a.word[i] = pack<T>(u.x, u.y);
            b.word[i] = pack<T>(v.x, v.y);
        } else {
            const Float2 u = turned(x.x, y.x, angles.of[2 * i]), v = turned(x.y, y.y, angles.of[2 * i + 1]);
            a.word[i] = pack<T>(u.x, v.x);
            b.word[i] = pack<T>(u.y, v.y);
        }
    }
    to.store16(first, a);
    to.store16(second, b);
}

template <class T, class From, class To>
LONGROPE_DEVICE void rotate_unit(const Regime& regime, int unit, const Angles<false>& angles, const From& from,
                                 const To& to) {
    if (unit >= regime.pairs) {
        const int dim = unit + regime.pairs;
        to.store1(dim, from.load1(dim));
        return;
    }
    const int first = regime.interleaved ? 2 * unit : unit;
    const int second = regime.interleaved ? first + 1 : unit + regime.pairs;
    const Float2 x = turned(widen(from.load1(first)), widen(from.load1(second)), angles.of[0]);
    to.store1(first, narrow<T>(x.x));
    to.store1(second, narrow<T>(x.y));
}

// A row in global memory.
template <class T>
struct GlobalRow {
    T* row;

    LONGROPE_DEVICE Vec16 load16(int chunk) const {
        return load_global(reinterpret_cast<const Vec16*>(row + chunk * 8));
    }
    LONGROPE_DEVICE void store16(int chunk, const Vec16& v) const {
        store_global(reinterpret_cast<Vec16*>(row + chunk * 8), v);
    }
    LONGROPE_DEVICE T load1(int dim) const { return load_global(static_cast<const T*>(row + dim)); }
    LONGROPE_DEVICE void store1(int dim, T x) const { store_global(row + dim, x); }
};

// Row `row` of a Tile.
template <class T, class TileT>
struct SharedRow {
    TileT tile;
    int row;

    LONGROPE_DEVICE Vec16 load16(int chunk) const { return load_shared<Vec16>(tile.chunk(row, chunk)); }
    LONGROPE_DEVICE void store16(int chunk, const Vec16& v) const { store_shared(tile.chunk(row, chunk), v); }
    LONGROPE_DEVICE T load1(int dim) const { return load_shared<T>(tile.element(row, dim)); }
    LONGROPE_DEVICE void store1(int dim, T x) const { store_shared(tile.element(row, dim), x); }
};

// Rotates rows [0, count) by the threads of a block, in units: `position_of(r)`, `from(r)` and `to(r)` say the rest.
template <class T, bool kChunks, int kThreads, class PositionOf, class From, class To>
LONGROPE_DEVICE void rotate_rows_in(const Regime& regime, int head_dim, int count, bool conjugate,
                                    const PositionOf& position_of, const From& from, const To& to) {
    const int units = regime.units<kChunks>(head_dim);
    for (int i = thread_index(); i < count * units; i += kThreads) {
        const int row = i / units, unit = i % units;
        rotate_unit<T>(regime, unit, angles_of<kChunks>(regime, unit, position_of(row), conjugate), from(row), to(row));
    }
}

template <class T, int kThreads, class PositionOf, class From, class To>
LONGROPE_DEVICE void rotate_rows(const Regime& regime, int head_dim, int count, bool conjugate,
                                 const PositionOf& position_of, const From& from, const To& to) {
    if (regime.in_chunks())
        rotate_rows_in<T, true, kThreads>(regime, head_dim, count, conjugate, position_of, from, to);
    else
        rotate_rows_in<T, false, kThreads>(regime, head_dim, count, conjugate, position_of, from, to);
}

}  // namespace longrope
