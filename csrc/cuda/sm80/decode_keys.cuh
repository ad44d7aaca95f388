// Scores of unrotated keys: a warp rotates the 16 keys of its own on their way from shared memory to the tensor cores.
//
// Fragments. A lane with g = lane / 4 and t = lane % 4 holds, of keys 7 - g and 8 + g, registers of two dims each. Of
// step s of kSteps / 2 it has four a key: first[0..1], second[0..1], half a tile further on. A `place` is where a pair
// lies in them, numbered ((2 s + c) 4 + t) 2 + e: the pair of element e of first[c] and second[c], or, interleaved, of
// both elements of first[c] (e = 0) or second[c] (e = 1). Dims that do not rotate are pairs of angle 0 and factor 1.
//
// Angles. Keys at consecutive positions lie (g + 1/2) tokens before and after the middle of the 16. The angle of the
// middle is exact, one place of it a lane, and so are the 8 distances, which the block keeps for all its tiles. One
// complex product gives both keys: cos and sin of a key cost 3 instructions, and are within 4e-7 of the exact ones.
// Keys are rotated to where they are, not by their distance from a query that moves instead: so they are rounded where
// the plain computation rounds them, and the query is rotated once.
//
// Half a token is half a frequency: its lowest bit is lost, 2^-64 turn a token, 2^-33 at the last position.
#pragma once

#include "decode_tiles.cuh"

namespace longrope {

// Angles go by half tokens around the middle of 16 keys.
LONGROPE_DEVICE int64_t half_of(int64_t turns) {
    return static_cast<int64_t>(static_cast<uint64_t>(turns) >> 1);
}
LONGROPE_DEVICE CosSin middle_angle(int first, int64_t half_turns) {
    return cos_sin(phase_of(2u * static_cast<uint32_t>(first) + 15u, half_turns));
}
LONGROPE_DEVICE CosSin distance_angle(int g, int64_t half_turns) {
    return cos_sin(phase_of(2 * g + 1, half_turns));
}
// Of keys 7 - g and 8 + g.
LONGROPE_DEVICE void angles_around(const CosSin& middle, const CosSin& distance, CosSin& before, CosSin& after) {
    const float cosine = middle.cos * distance.cos, sine = middle.sin * distance.cos;
    before = {cosine + middle.sin * distance.sin, sine - middle.cos * distance.sin};
    after = {cosine - middle.sin * distance.sin, sine + middle.cos * distance.sin};
}

template <class S>
struct Places {
    // The key tile's column of element 0 of first[c].
    static LONGROPE_DEVICE int column(int entry) {
        const int group = entry / 4, t = entry % 4;
        return S::kQuantised ? 16 * (group / 2) + 4 * t + 2 * (group % 2) : 8 * group + 2 * t;
    }
    // The query tile's column for a column of the key tile: the products' order is that of the fragments.
    static LONGROPE_DEVICE int query_column(int column) {
        if (!S::kQuantised) return column;
        const int i = column % 16;
        return column - i + 8 * (i / 2 % 2) + i / 4 * 2 + i % 2;
    }
    // The pair at a place; none from the number of pairs on.
    static LONGROPE_DEVICE int pair(bool interleaved, int place) {
        const int first = column(place / 2), e = place % 2;
        return interleaved ? (first + e * S::kPairs) / 2 : first + e;
    }
};

// The angles of keys at consecutive positions that have one table of frequencies. What the tables are made from is read
// when they are made, which is once or twice: registers are for what each tile needs.
template <class S>
class TableAngles {
  public:
    // Called by all threads before each tile. `below`: its keys are below start_tokens.
    LONGROPE_DEVICE void begin(const AttentionParams& p, uint32_t b, bool below, int first, int) {
        if (table_ != below) {
            table_ = below;
            block_sync();  // the tables before are done with
            fill(regime_of(p.rotation, b), below);
            block_sync();  // half the frequencies are there
        }
        warp_sync();  // the middle before is done with
#pragma unroll
        for (int place = lane_index(); place < S::kPairs; place += 32) {
            const CosSin x = middle_angle(first + 16 * warp_index(), load_shared<int64_t>(S::kHalfTurns + 8 * place));
            store_shared(middles() + 8 * place, Float2{x.cos, x.sin});
        }
    }

    LONGROPE_DEVICE void of(CosSin (&keys)[2][2], int entry, int group) const {
        const Float4 middle = load_shared<Float4>(middles() + 16 * entry);
        const Float4 distance = load_shared<Float4>(S::kDistances + 16 * (32 * group + lane_index()));
#pragma unroll
        for (int e = 0; e < 2; ++e)
            angles_around({middle.at[2 * e], middle.at[2 * e + 1]}, {distance.at[2 * e], distance.at[2 * e + 1]},
                          keys[0][e], keys[1][e]);
    }

  private:
    int table_ = -1;  // none; 1: below start_tokens

    static LONGROPE_DEVICE SharedAddress middles() { return S::kMiddles + warp_index() * S::kMiddleBytes; }

    // The distances have the attention factor, in the order [group of 4 entries][g][t][e]: what a warp reads at once
    // lies side by side.
    static LONGROPE_DEVICE void fill(const Regime& regime, bool below) {
        const int64_t* turns = below ? regime.base_turns : regime.turns;
#pragma unroll 1
        for (int i = thread_index(); i < 8 * S::kPairs; i += S::kThreads) {
            const int place = i / 64 * 8 + i % 8, g = i / 8 % 8, pair = Places<S>::pair(regime.interleaved, place);
            const bool rotates = pair < regime.pairs;
            const int64_t half = rotates ? half_of(load_global(turns + pair)) : 0;
            const CosSin x = distance_angle(g, half);
            const float factor = rotates ? regime.factor : 1.0f;
            store_shared(S::kDistances + 8 * i, Float2{x.cos * factor, x.sin * factor});
            if (g == 0) store_shared(S::kHalfTurns + 8 * place, half);
        }
    }
};

// The angles of keys anywhere: every one from its position.
template <class S>
class ExactAngles {
  public:
    LONGROPE_DEVICE ExactAngles(const AttentionParams& p, uint32_t b, int first) {
        const Sequence s(p, b);
        const Regime regime = regime_of(p.rotation, b);
        factor_ = regime.factor;
        const int last = static_cast<int>(s.key_length) - 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int index = first + S::key(half, lane_index() / 4);
            position_[half] = s.key_position(p, index < last ? index : last);
            turns_[half] = position_[half] < regime.start_tokens ? regime.base_turns : regime.turns;
        }
        interleaved_ = regime.interleaved;
        pairs_ = regime.pairs;
    }

    LONGROPE_DEVICE void of(CosSin (&keys)[2][2], int entry, int) const {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            warp_sync();  // as in ScatteredKeys
            const int pair = Places<S>::pair(interleaved_, 2 * entry + e);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                keys[half][e] = {1.0f, 0.0f};
                if (pair >= pairs_) continue;
                const CosSin x = cos_sin(phase_of(position_[half], load_global(turns_[half] + pair)));
                keys[half][e] = {x.cos * factor_, x.sin * factor_};
            }
        }
    }

  private:
    const int64_t* turns_[2];
    int64_t position_[2];
    float factor_;
    int pairs_;
    bool interleaved_;
};

// Of one key: first[c] and second[c], widened.
struct PairDims {
    float first[2], second[2];
};

// Keys in the dtype of the query.
template <class T, class S>
class PlainKeys {
  public:
    LONGROPE_DEVICE explicit PlainKeys(int stage) : tile_{S::stage(stage)} {}

    LONGROPE_DEVICE void load(int step) {
        const int row = S::key_row(lane_index() / 16), half = lane_index() / 8 % 2;
        load_matrices(first_, tile_.half_step(0, row, half, step));
        load_matrices(second_, tile_.half_step(0, row, half, step + S::kSteps / 2));
    }
    LONGROPE_DEVICE PairDims get(int half, int, int c) const {
        const Float2 a = unpack<T>(first_[2 * half + c]), b = unpack<T>(second_[2 * half + c]);
        return {{a.x, a.y}, {b.x, b.y}};
    }

  private:
    typename S::KeyTile tile_;
    uint32_t first_[4], second_[4];  // [2 half + c]
};

// Quantised keys: a register has four dims.
template <class Q, class S>
class QuantisedKeys {
  public:
    LONGROPE_DEVICE QuantisedKeys(int stage, SharedAddress scales) : tile_{S::stage(stage)}, scales_(scales) {}

    LONGROPE_DEVICE void load(int step) {
        const int row = S::key_row(lane_index() / 16);
        load_matrices(bytes_, tile_.chunk(row, step + lane_index() / 8 % 2 * (S::kSteps / 2)));
        const SharedAddress scales = scales_ + 4 * (16 * step + lane_index() % 4 * 4);
        scale_[0] = load_shared<Float4>(scales);
        scale_[1] = load_shared<Float4>(scales + 4 * S::kPairs);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                values_[half][i] = Quantised<Q>::unpack4(bytes_[2 * half + i]);
#pragma unroll
                for (int d = 0; d < 4; ++d) values_[half][i].at[d] *= scale_[i].at[d];
            }
    }
    LONGROPE_DEVICE PairDims get(int half, int, int c) const {
        const float *a = values_[half][0].at + 2 * c, *b = values_[half][1].at + 2 * c;
        return {{a[0], a[1]}, {b[0], b[1]}};
    }

  private:
    typename S::ByteTile tile_;
    SharedAddress scales_;
    uint32_t bytes_[4];
    Float4 scale_[2], values_[2][2];
};

// Keys whose pairs come in no whole chunks, or that are not quantised yet, dim by dim. `row_at(r)` is row r of the
// tile, its dims in their own order.
template <class S, class RowAt>
class ScatteredKeys {
  public:
    LONGROPE_DEVICE ScatteredKeys(const AttentionParams& p, const RowAt& row_at)
        : columns_(p.rotation), head_dim_(static_cast<int>(p.head_dim)), row_at_(row_at) {}

    LONGROPE_DEVICE void load(int) {}
    LONGROPE_DEVICE PairDims get(int half, int entry, int) const {
        warp_sync();  // one key after another: together they take registers that the rest of the kernel needs
        const auto row = row_at_(S::key(half, lane_index() / 4));
        PairDims x;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = Places<S>::column(entry) + e;
            const int a = columns_.dim(column), b = columns_.dim(column + S::kPairs);
            x.first[e] = a < head_dim_ ? row.load1(a) : 0.0f;
            x.second[e] = b < head_dim_ ? row.load1(b) : 0.0f;
        }
        return x;
    }

  private:
    Columns<2 * S::kPairs> columns_;
    int head_dim_;
    RowAt row_at_;
};

template <class T>
LONGROPE_DEVICE void rotate_pairs(PairDims x, const CosSin (&angles)[2], bool interleaved, uint32_t& first,
                                  uint32_t& second) {
    const Float2 a = turned(x.first[0], interleaved ? x.first[1] : x.second[0], angles[0]);
    const Float2 b = turned(interleaved ? x.second[0] : x.first[1], x.second[1], angles[1]);
    first = pack<T>(a.x, interleaved ? a.y : b.x);
    second = pack<T>(interleaved ? b.x : a.y, b.y);
}

// Adds step s of the products of the queries with the warp's rotated keys: their first dims and their second, by half.
template <class T, class S>
LONGROPE_DEVICE void multiply_rotated(float (&scores)[2][4], const typename S::QueryTile& queries, int s,
                                      const uint32_t (&first)[2][2], const uint32_t (&second)[2][2]) {
    uint32_t q[4];
    load_left(q, queries, 0, s);
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply_add<T>(scores[half], q, first[half]);
    load_left(q, queries, 0, s + S::kSteps / 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply_add<T>(scores[half], q, second[half]);
}

// The same of keys that are still to be rotated.
template <class T, class S, class Keys, class Angles>
LONGROPE_DEVICE void multiply_step(float (&scores)[2][4], int s, Keys& keys, const Angles& angles, bool interleaved) {
    uint32_t first[2][2], second[2][2];
    keys.load(s);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const int group = 2 * s + c, entry = 4 * group + lane_index() % 4;
        CosSin turn[2][2];
        angles.of(turn, entry, group);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rotate_pairs<T>(keys.get(half, entry, c), turn[half], interleaved, first[half][c], second[half][c]);
    }
    multiply_rotated<T, S>(scores, {0}, s, first, second);
}

template <class T, class S, bool kInterleaved, class Keys, class Angles>
LONGROPE_DEVICE void multiply_keys(float (&scores)[2][4], Keys keys, const Angles& angles) {
#pragma unroll
    for (int s = 0; s < S::kSteps / 2; ++s) multiply_step<T, S>(scores, s, keys, angles, kInterleaved);
}
// The same where it is seldom done, in less code.
template <class T, class S, class Keys, class Angles>
LONGROPE_DEVICE void multiply_keys_in_a_loop(float (&scores)[2][4], Keys keys, const Angles& angles, bool interleaved) {
#pragma unroll 1
    for (int s = 0; s < S::kSteps / 2; ++s) multiply_step<T, S>(scores, s, keys, angles, interleaved);
}

}  // namespace longrope
