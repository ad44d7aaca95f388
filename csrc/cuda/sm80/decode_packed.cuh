// Scores of a quantised cache's keys for queries in bf16, in fp16 arithmetic: two dims an instruction.
//
// Plain arithmetic rounds a widened key and a rotated one to bf16, 2^-9 each; here a key is rounded to fp16 six times
// (by its scale, its cos and sin, their product, the rotation), 2^-12 each. What fp16 lacks is range, which powers of
// two give back:
//   - a pair of dims has a unit, the power of two below its largest scale in the run of 512 keys. It divides the scales
//     and multiplies the queries: a rotation does not mix pairs. The attention factor goes with it.
//   - a row of the rotated queries has a unit that makes its largest element 2^14; it multiplies the scores.
//   - the scales of the run's values have one unit, which multiplies the sums.
// Scales that are 2^10 apart in one pair (values': 2^20), or not finite, are seldom, and so are elements of a row 2^30
// apart, as of a query that masks keys by one large element: such a run takes the way of keys anywhere
// (decode_keys.cuh).
//
// Places. In step s a lane has two words of a key, of four bytes: dims 16 s + 4 t + i, and those half a tile further
// on. Pairs come two in a register. Where their dims are half a tile apart, register c = 0, 1 of a word has half c of
// it; interleaved, the two registers of word c = 0, 1 have the first and the second dims of its two pairs.
#pragma once

#include "decode_keys.cuh"
#include "decode_tiles.cuh"

namespace longrope {

// Whether fp16 has the range of a run's keys, with the block's queries; of its values, whose scales were then divided
// by a unit, which waits in shared memory for the sums.
struct RunScales {
    bool keys, values;
};

// The power of two at or below a number, 1 for 0; what undoes it.
LONGROPE_DEVICE float unit_of(float x) {
    return x == 0.0f ? 1.0f : as_float(as_bits(x) & 0x7f800000u);
}
LONGROPE_DEVICE float inverse_unit(float unit) {
    return as_float(0x7f000000u - as_bits(unit));
}
// Whether numbers from `least` above 0 (infinity if there are none) to `most` are at most `apart` apart and lie well
// within fp32.
LONGROPE_DEVICE bool in_range(float least, float most, float apart) {
    return most == 0.0f || (most >= 0x1p-100f && most <= 0x1p100f && least * apart >= most);
}

// Of magnitudes: the least above 0, and the most. A number that is not finite is as good as one out of range.
struct Extremes {
    float least = infinity(), most = 0.0f;

    LONGROPE_DEVICE void add(float x) {
        const float magnitude = fabsf(x);
        if (!(magnitude < infinity())) most = infinity();
        most = fmaxf(most, magnitude);
        if (magnitude > 0.0f) least = fminf(least, magnitude);
    }
};

template <class S>
struct PackedPlaces {
    // Of a column of the key tile: its pair's place; its scale's among the four of its word.
    static LONGROPE_DEVICE int pair(bool interleaved, int column) {
        return interleaved ? column / 2 : column % S::kPairs;
    }
    static LONGROPE_DEVICE int in_word(bool interleaved, int i) { return interleaved ? i % 2 * 2 + i / 2 : i; }
    // The column that the query tile has for it.
    static LONGROPE_DEVICE int query_column(bool interleaved, int column) {
        const int i = in_word(interleaved, column % 4);
        return column / 16 * 16 + 8 * (i / 2) + column % 16 / 4 * 2 + i % 2;
    }
    // The pair that element e of register c of step s and place t has, where they are numbered 16 s + 4 t + 2 c + e.
    static LONGROPE_DEVICE int pair_at(bool interleaved, int place) {
        return interleaved ? place / 16 * 8 + place / 4 % 4 * 2 + place % 2 + place / 2 % 2 * (S::kPairs / 2) : place;
    }
    // Scales of words: [group][step][t][first, second][4].
    static LONGROPE_DEVICE SharedAddress scales(int group, int step, int t) {
        return S::kPackedScales + 2 * S::kPairs * 2 * group + 16 * (4 * step + t);
    }
};

// Looks at the scales of the run, makes units of them, and the packed scales; by all threads, which wait for the copies
// before, and for one another after. T is the queries' type.
template <class T, class Q, class S>
LONGROPE_DEVICE RunScales prepare_scales(const Regime& regime) {
    Extremes values;
    for (int i = thread_index(); i < kSplitKeys; i += S::kThreads) values.add(load_shared<float>(S::value_scale(i)));
    bool keys = true;
    if constexpr (S::kPacked) {
        using P = PackedPlaces<S>;
        const bool interleaved = regime.interleaved;
        for (int pair = thread_index(); pair < S::kPairs; pair += S::kThreads) {
            const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : first + S::kPairs;
            Extremes of;
#pragma unroll
            for (int g = 0; g < S::kGroups; ++g) {
                of.add(load_shared<float>(S::channel_scales(g * kKeyGroup) + 4 * first));
                of.add(load_shared<float>(S::channel_scales(g * kKeyGroup) + 4 * second));
            }
            keys = keys && in_range(of.least, of.most, 0x1p10f);
            const float unit = unit_of(of.most);
            store_shared(S::kPairUnits + 4 * pair, pair < regime.pairs ? unit * regime.factor : unit);
            const float factor = inverse_unit(unit) * (Quantised<Q>::kLargestScale * Quantised<Q>::kScaleFactor);
#pragma unroll
            for (int i = 0; i < 2 * S::kGroups; ++i) {
                const int g = i / 2, column = i % 2 ? second : first, in_half = column % S::kPairs;
                const float scale = load_shared<float>(S::channel_scales(g * kKeyGroup) + 4 * column) * factor;
                store_shared(P::scales(g, in_half / 16, in_half % 16 / 4) + 8 * (column / S::kPairs) +
                                 2 * P::in_word(interleaved, column % 4),
                             narrow<Half>(scale));
            }
        }
        keys = !any_lane(!keys);
    }
    const float least = -warp_max(-values.least), most = warp_max(values.most);
    const SharedAddress found_at = S::found(warp_index());
    if (lane_index() == 0) {
        store_shared(found_at, least);
        store_shared(found_at + 4, most);
        store_shared(found_at + 8, keys);
    }
    block_sync();
    values = {};
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
        values.least = fminf(values.least, load_shared<float>(S::found(w)));
        values.most = fmaxf(values.most, load_shared<float>(S::found(w) + 4));
        keys = keys && load_shared<bool>(S::found(w) + 8);
    }
    const bool divide = in_range(values.least, values.most, S::kPacked ? 0x1p20f : infinity());
    const float unit = divide ? unit_of(values.most) * 0x1p-14f : 1.0f;  // a probability of 1 then weighs at most 2^15
    if (thread_index() == 0) store_shared(S::kValueUnit, unit);
    for (int i = thread_index(); i < kSplitKeys; i += S::kThreads)
        store_shared(S::value_scale(i), load_shared<float>(S::value_scale(i)) * inverse_unit(unit));
    return {keys, divide};
}

// The rotated queries in fp32 become tiles: of T in the order of decode_keys.cuh, and packed, with the units of their
// rows. Returns whether fp16 has the range of all rows; by all threads, which wait for one another. A row with a number
// that is not finite comes to none either way, and does not count: it changes no bit of the others.
template <class T, class Q, class S>
LONGROPE_DEVICE bool store_queries(const Rotation& rotation, int head_dim, int rows) {
    using P = PackedPlaces<S>;
    const Columns<2 * S::kPairs> columns(rotation);
    const bool interleaved = rotation.interleaved != 0;
    const typename S::QueryTile plain{0}, packed{S::QueryTile::kBytes};
    bool fit = true;
    for (int row = rows + thread_index(); row < kBlockRows; row += S::kThreads)
        store_shared(S::kRowUnits + 4 * row, 0.0f);
#pragma unroll 1
    for (int row = warp_index(); row < rows; row += S::kWarps) {
        const int lane = static_cast<int>(anew(lane_index()));  // places are made row by row: they take registers
        const SharedFloatRow from{S::kRotated + static_cast<SharedAddress>(row * head_dim * 4)};
        float x[S::kPairs / 16];
        Extremes of;
        bool finite = true;
#pragma unroll
        for (int i = 0; i < S::kPairs / 16; ++i) {
            const int dim = 32 * i + lane;
            if (dim >= head_dim) break;
            const int column = columns.column(dim);
            const float rotated = from.load1(dim);
            store_shared(plain.element(row, Places<S>::query_column(column)), narrow<T>(rotated));
            finite = finite && fabsf(rotated) < infinity();
            x[i] = rotated * load_shared<float>(S::kPairUnits + 4 * P::pair(interleaved, column));
            of.add(x[i]);
        }
        const float most = warp_max(of.most), unit = unit_of(fminf(most, 0x1p100f)) * 0x1p-14f;
        finite = !any_lane(!finite);
        fit = fit && (!finite || in_range(of.least, most, 0x1p30f));
#pragma unroll
        for (int i = 0; i < S::kPairs / 16; ++i) {
            const int dim = 32 * i + lane;
            if (dim >= head_dim) break;
            const int column = P::query_column(interleaved, columns.column(dim));
            store_shared(packed.element(row, column), narrow<Half>(x[i] * inverse_unit(unit)));
        }
        if (lane_index() == 0) store_shared(S::kRowUnits + 4 * row, unit * (1.0f / Quantised<Q>::kLargestScale));
    }
    fit = !any_lane(!fit);
    if (lane_index() == 0) store_shared(S::found(warp_index()) + 12, fit);
    block_sync();
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) fit = fit && load_shared<bool>(S::found(w) + 12);
    return fit;
}

// cos and sin of two pairs, in two registers of fp16.
struct PackedAngle {
    uint32_t cos, sin;
};

// The angles of a tile's keys at consecutive positions that have one table of frequencies.
template <class S>
class PackedAngles {
    using P = PackedPlaces<S>;

  public:
    // Called by all threads before the barrier of each tile, of which every second has the same stage.
    LONGROPE_DEVICE void begin(const AttentionParams& p, uint32_t b, bool below, int first, int stage) {
        if (table_ != below) {
            table_ = below;
            block_sync();  // the tables before are done with
            fill(regime_of(p.rotation, b), below);
            block_sync();  // half the frequencies are there
        }
        for (int place = thread_index(); place < S::kPairs; place += S::kThreads) {
            const int64_t half = load_shared<int64_t>(S::kHalfTurns + 8 * place);
            store(middles(stage), place, cos_sin(phase_of(2 * static_cast<uint32_t>(first) + S::kKeys - 1, half)));
        }
    }

    // Of step s: of the keys before the middle (0) and after, c.
    LONGROPE_DEVICE void of(PackedAngle (&keys)[2][2], int step, int stage) const {
        const Vec16 middle = load_shared<Vec16>(middles(stage) + 16 * (4 * step + lane_index() % 4));
        const Vec16 distance = load_shared<Vec16>(distances(warp_index(), step) + 16 * lane_index());
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const uint32_t cos = middle.word[2 * c], sin = middle.word[2 * c + 1];
            const uint32_t by_cos = distance.word[2 * c], by_sin = distance.word[2 * c + 1];
            const uint32_t cosine = multiply_halves(cos, by_cos), sine = multiply_halves(sin, by_cos);
            keys[0][c] = {multiply_add_halves(sin, by_sin, cosine),
                          multiply_add_halves(negate_halves(cos), by_sin, sine)};
            keys[1][c] = {multiply_add_halves(negate_halves(sin), by_sin, cosine),
                          multiply_add_halves(cos, by_sin, sine)};
        }
    }

  private:
    int table_ = -1;  // none; 1: below start_tokens

    static LONGROPE_DEVICE SharedAddress middles(int stage) { return S::kMiddles + stage * S::kMiddleBytes; }
    // Of a warp's keys, of a step: [g][t][c], what a warp reads at once side by side.
    static LONGROPE_DEVICE SharedAddress distances(int warp, int step) {
        return S::kDistances + (warp * (S::kPairs / 16) + step) * 512;
    }
    static LONGROPE_DEVICE void store(SharedAddress places, int place, const CosSin& x) {
        const SharedAddress at = places + place / 2 * 8 + place % 2 * 2;
        store_shared(at, narrow<Half>(x.cos));
        store_shared(at + 4, narrow<Half>(x.sin));
    }

    // A thread has one place, and part of its distances: each is a token further on than the one before, and turned by
    // one more product. 16 of them are off by 4e-6 at the most, a hundredth of what fp16 rounds away.
    static LONGROPE_DEVICE void fill(const Regime& regime, bool below) {
        constexpr int kParts = S::kThreads / S::kPairs > 0 ? S::kThreads / S::kPairs : 1, kOf = S::kKeys / 2 / kParts;
        const int64_t* turns = below ? regime.base_turns : regime.turns;
#pragma unroll 1
        for (int i = thread_index(); i < kParts * S::kPairs; i += S::kThreads) {
            const int place = i % S::kPairs, part = i / S::kPairs, pair = P::pair_at(regime.interleaved, place);
            const int64_t half = pair < regime.pairs ? half_of(load_global(turns + pair)) : 0;
            if (part == 0) store_shared(S::kHalfTurns + 8 * place, half);
            const CosSin token = cos_sin(phase_of(2, half));
            CosSin x = cos_sin(phase_of(2 * kOf * part + 1, half));
#pragma unroll 4
            for (int k = 0; k < kOf; ++k) {
                const int distance = kOf * part + k;
                store(distances(distance / 8, place / 16) + distance % 8 * 64, place % 16, x);
                const Float2 next = turned(x.cos, x.sin, token);
                x = {next.x, next.y};
            }
        }
    }
};

// The pairs of two registers, turned.
LONGROPE_DEVICE void turn_packed(uint32_t& first, uint32_t& second, const PackedAngle& angle) {
    const uint32_t a = first, b = second;
    first = multiply_add_halves(a, angle.cos, negate_halves(multiply_halves(b, angle.sin)));
    second = multiply_add_halves(b, angle.cos, multiply_halves(a, angle.sin));
}

// The scores of the warp's 16 keys in a stage, whose group of the run is `group`.
template <class Q, class S, bool kInterleaved>
LONGROPE_DEVICE void multiply_packed(float (&scores)[2][4], const PackedAngles<S>& angles, int group, int stage) {
    const typename S::ByteTile tile{S::stage(stage)};
    const int row = S::key_row(lane_index() / 16);
#pragma unroll
    for (int step = 0; step < S::kSteps / 2; ++step) {
        uint32_t words[4];
        load_matrices(words, tile.chunk(row, step + lane_index() / 8 % 2 * (S::kSteps / 2)));
        const Vec16 scales = load_shared<Vec16>(PackedPlaces<S>::scales(group, step, lane_index() % 4));
        const uint32_t of_first[2] = {scales.word[0], scales.word[1]}, of_second[2] = {scales.word[2], scales.word[3]};
        PackedAngle turns[2][2];
        angles.of(turns, step, stage);
        uint32_t first[2][2], second[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Quantised<Q>::scaled_halves(first[half], words[2 * half], kInterleaved, of_first);
            Quantised<Q>::scaled_halves(second[half], words[2 * half + 1], kInterleaved, of_second);
            if (kInterleaved) {
                turn_packed(first[half][0], first[half][1], turns[half][0]);
                turn_packed(second[half][0], second[half][1], turns[half][1]);
            } else {
                turn_packed(first[half][0], second[half][0], turns[half][0]);
                turn_packed(first[half][1], second[half][1], turns[half][1]);
            }
        }
        multiply_rotated<Half, S>(scores, {S::QueryTile::kBytes}, step, first, second);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float unit = load_shared<float>(S::kRowUnits + lane_index() / 4 * 4 + 32 * r);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int c = 0; c < 2; ++c) scores[half][2 * r + c] *= unit;
    }
}

}  // namespace longrope
