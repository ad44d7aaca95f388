// Attention of a few query rows over many keys, for one instruction set: decoding, speculative decoding, short chunks.
//
// One pass over the cache and no packing. Keys are split by index into runs of 2048, a task each, so that the bits do
// not depend on how many threads there are; the runs' partial outputs are merged in order. Within a run, 32 keys at
// consecutive positions p0 + j share their rotation: the query is rotated by its distance to p0 (exactly at the run's
// beginning, from there by a step that all runs share), and key j by the angle of j alone, from a table of 32 angles
// that stays in L1. No sine or cosine is computed for a key. Blocks split at n-hat, where the frequencies change, and
// where a quantised cache's full-precision tail begins.
//
// Scores are formed in fp32 from rotated operands that are never rounded: with the few rows of a decode step, the error
// rule's largest error is over few numbers, and rounding both sides at other places than the plain computation breaks
// it in 5% of draws (measured). Weights are rounded to bf16 for bf16 values, whose products run in pairs of keys.
//
// An int8 cache of bf16 queries is multiplied in integers instead, 64 keys at a time, see attention_decode_int8.h.
//
// Bytes: each key and value is read once for all query heads that share it. While the keys of a block are multiplied
// its values are asked for, and half of each of the next block's keys; the other half while the values are added: as
// many bytes a cycle in both. They are asked for into L2, see prefetch_row. Operations, in vectors of 16 and for
// head_dim 128 and 4 query rows in bf16: a key takes 16 to widen, 16 to rotate and 32 products; a value 4 to pair with
// its neighbour and 16 products; the transposition of the sums 11, the softmax 5. That is 100, 68 of them
// multiplications, for 512 bytes. Zen 4 takes one multiplication of 64 bytes a cycle and two operations in all: 109
// cycles were measured from L2, 60 of them for the scores, where reading 512 bytes takes 125 at 15 GB/s a core.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_decode_int8.h"
#include "parallel.h"
#include "rows.h"
#include "tile.h"

namespace longrope {
namespace {

constexpr int kDecodeRows = 16;       // query rows of a key head that share a pass over the keys
constexpr int kDecodeMostRows = 64;   // rows of a sequence: beyond, packing the keys once costs less than the passes
constexpr int kDecodeGroup = 8;       // rows whose sums are in registers at once
constexpr int kDecodeKeys = 32;       // keys that share a query rotation, where they are multiplied in floating point
constexpr int kDecodeMostKeys = 64;   // the same in integers, whose tables take half the room
constexpr int64_t kDecodeRun = 2048;  // keys of a task

// How the dims of a key are read: spread into a buffer first, from the row itself, or, as the compiler knows what to
// add to an address, from a row of so many pairs that all rotate.
constexpr int kSpread = -1, kInPlace = 0;

static_assert(kDecodeMostKeys % kDecodeKeys == 0 && kKeyGroup % kDecodeMostKeys == 0 && kDecodeRun % kKeyGroup == 0);

// The largest row count up to `rows` that has code of its own.
constexpr int decode_group(int rows) {
    return rows >= 8 ? 8 : rows >= 6 ? 6 : std::min(rows, 4);
}

// Whether weights and values are multiplied in bf16 pairs, with fp32 sums.
template <class T>
constexpr bool multiplies_pairs() {
#if defined(__AVX512BF16__)
    return std::is_same_v<T, BFloat16>;
#else
    return false;
#endif
}

// Whether int8 keys and values are multiplied in integers.
template <class T>
constexpr bool multiplies_integers() {
#if defined(LONGROPE_INTEGER_DECODE)
    return std::is_same_v<T, BFloat16>;
#else
    return false;
#endif
}

// T: dtype of queries, of the output, and of keys and values unless the cache is quantised.
template <class T>
class Decoder {
  public:
    // Attends for `sequences`, each of at most kDecodeMostRows rows a key head.
    Decoder(const AttentionParams& params, const std::vector<int64_t>& sequences)
        : p(params),
          sequences(sequences),
          pairs(p.rotation.pairs),
          half(pad(pairs)),
          rest(pad(p.head_dim - 2 * pairs)),
          width(2 * half + rest),
          columns(pad(p.head_dim)),
          group(p.query_heads / p.key_heads),
          in_place(!p.rotation.interleaved && pairs % kLanes == 0 && (p.head_dim - 2 * pairs) % kLanes == 0),
          integers(multiplies_integers<T>() && quantised(p) && in_place && rest == 0 &&
                   (half == 32 || half == 64 || half == 128)) {
        for (int64_t b : sequences) {
            first_task.push_back(first_task.back() + p.key_heads * row_groups(b) * runs(b));
            blocks = std::max(blocks, (std::min(p.key_length[b], kDecodeRun) + kDecodeKeys - 1) / kDecodeKeys);
            most_rows = std::max<int64_t>(most_rows, std::min<int64_t>(row_count(b), kDecodeRows));
            regimes = std::max<int64_t>(regimes, p.rotation.regime_index[b] + 1);
        }
        fill_tables();
    }

    void run() {
        const int64_t run_elements = most_rows * (columns + 2), tasks = first_task.back();
        const Buffer<float> partial = allocate<float>(tasks * run_elements);
        std::atomic<int64_t> next{0};
        run_workers(static_cast<int>(std::min<int64_t>(p.threads, tasks)), [&](int) {
            Workspace w(*this);
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
                const int64_t s = std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
                const int64_t b = sequences[s], part = (task - first_task[s]) / runs(b);
                w.begin(p, b, part / row_groups(b), part % row_groups(b) * kDecodeRows, group);
                attend_run(w, (task - first_task[s]) % runs(b), partial.get() + task * run_elements);
            }
        });
        for (size_t s = 0; s < sequences.size(); ++s) {
            const int64_t b = sequences[s];
            for (int64_t part = 0; part < p.key_heads * row_groups(b); ++part)
                merge(b, part / row_groups(b), part % row_groups(b) * kDecodeRows,
                      partial.get() + (first_task[s] + part * runs(b)) * run_elements, run_elements);
        }
    }

  private:
    const AttentionParams& p;
    const std::vector<int64_t>& sequences;
    int64_t pairs, half, rest, width, columns, group;
    bool in_place;  // rows are read where they lie; else they are spread into a buffer first
    bool integers;  // int8 keys and values are multiplied as attention_decode_int8.h says
    int64_t most_rows = 0, regimes = 1;
    // Tasks are runs of keys, for each group of rows of each key head of each sequence: the first task of each
    // sequence.
    std::vector<int64_t> first_task = {0};
    int64_t blocks = 0;            // of a run, at most
    Buffer<float> tables;          // [regime][scaled or base][key of a block][cos of half, sin of half]
    Buffer<int16_t> short_tables;  // [regime][scaled or base][key of a block][cos of half, sin of half], for `integers`
    Buffer<float> steps;  // [regime][block of a run][cos, sin]: of its distance to the run's beginning, backwards

    int64_t row_count(int64_t b) const { return group * query_count(p, b); }
    int64_t row_groups(int64_t b) const { return (row_count(b) + kDecodeRows - 1) / kDecodeRows; }
    int64_t runs(int64_t b) const { return (p.key_length[b] + kDecodeRun - 1) / kDecodeRun; }

    static int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
    int64_t table_elements() const { return int64_t{kDecodeKeys} * 2 * half; }
    int64_t short_table_elements() const { return int64_t{kDecodeMostKeys} * 2 * half; }
    int64_t step_elements() const { return blocks * 2 * half; }

    static Buffer<float> zeros(int64_t count) {
        Buffer<float> buffer = allocate<float>(count);
        std::memset(buffer.get(), 0, sizeof(float) * count);
        return buffer;
    }

    struct Workspace {
        Buffer<float> unrotated;  // [rows][width]: first halves of the pairs, second halves, the rest
        Buffer<float> at_run;     // the same, rotated for the first key of a run
        Buffer<float> query;      // the same, rotated for a block
        Buffer<float> angles;     // [2][half]
        Buffer<float> row;        // [width], a key spread out; [columns], its scales
        Buffer<float> scores;     // [rows][kDecodeMostKeys], then probabilities in fp32, bf16 or int16
        Buffer<float> sums;       // [kDecodeGroup][kLanes vectors]
        // Of `integers`: rows in the order of `unpacked`.
        Buffer<int16_t> short_query;  // [rows][2 half], rotated for a block, times the scales of the pairs
        Buffer<int16_t> ratios;       // [2 half], scales of the keys over those of the pairs
        Buffer<float> pair_scales;    // [half], the larger scale of each pair over the largest of all
        Buffer<float> pair_norms;     // [rows][half], of the query over its largest value
        float largest_scale;
        int64_t scales_of = -1;  // the first key of the group whose scales are there
        bool group_in_integers;
        float largest_query[kDecodeRows], product_norms[kDecodeRows], product_sizes[kDecodeRows];
        float score_scales[kDecodeRows], weight_scales[kDecodeRows];
        int64_t b, head, first_row, low[kDecodeRows], high[kDecodeRows];
        int64_t run_begin = -1;  // the key whose angles `at_run` has
        int rows;
        const void *keys[kDecodeMostKeys], *values[kDecodeMostKeys];
        const void* next_keys[kDecodeMostKeys];  // of the block after this one, or of this one at the end
        float value_scales[kDecodeMostKeys] = {};
        vf row_sums[kDecodeRows];  // by lane, of a run so far

        explicit Workspace(const Decoder& d)
            : unrotated(zeros(kDecodeRows * d.width)),
              at_run(zeros(kDecodeRows * d.width)),
              query(zeros(kDecodeRows * d.width)),
              angles(zeros(2 * d.half)),
              row(zeros(2 * d.width + 2 * kLanes)),
              scores(zeros(kDecodeRows * kDecodeMostKeys)),
              sums(zeros(kDecodeGroup * kLanes * kLanes)),
              short_query(allocate<int16_t>(kDecodeRows * 2 * d.half)),
              ratios(allocate<int16_t>(2 * d.half)),
              pair_scales(zeros(d.half)),
              pair_norms(zeros(kDecodeRows * d.half)) {}

        void begin(const AttentionParams& p, int64_t sequence, int64_t key_head, int64_t row, int64_t group) {
            b = sequence;
            head = key_head;
            first_row = row;
            run_begin = -1;
            scales_of = -1;
            rows = static_cast<int>(std::min<int64_t>(group * query_count(p, b) - row, kDecodeRows));
            for (int r = 0; r < rows; ++r) visible_keys(p, b, (row + r) / group, &low[r], &high[r]);
        }
    };

    void fill_tables() {
        tables = zeros(regimes * 2 * table_elements());
        steps = zeros(regimes * step_elements());
        if (integers) short_tables = allocate<int16_t>(regimes * 2 * short_table_elements());
        for (int64_t regime = 0; regime < regimes; ++regime) {
            const int64_t* scaled = p.rotation.turns + regime * pairs;
            const float factor = p.rotation.attention_factor[regime];
            for (const bool base : {false, true}) {
                if (base && p.rotation.start_tokens[regime] == 0) continue;
                const int64_t* turns = base ? p.rotation.base_turns + regime * pairs : scaled;
                float* to = tables.get() + (2 * regime + base) * table_elements();
                for (int key = 0; key < kDecodeKeys; ++key) fill_angles(to + key * 2 * half, key, turns, factor);
                if (integers)
                    fill_short_table(short_tables.get() + (2 * regime + base) * short_table_elements(), turns);
            }
            float* to = steps.get() + regime * step_elements();
            for (int64_t block = 0; block < blocks; ++block)
                fill_angles(to + block * 2 * half, -block * kDecodeKeys, scaled, 1.0f);
        }
    }

    void fill_angles(float* to, int64_t position, const int64_t* turns, float factor) const {
        for (int64_t i = 0; i < pairs; ++i) {
            const CosSin value = cos_sin(phase_of(position, turns[i]));
            to[i] = value.cos * factor;
            to[half + i] = value.sin * factor;
        }
    }

    // cos and sin, without the attention factor, as multiples of 2^-kTurnBits.
    void fill_short_table(int16_t* to, const int64_t* turns) const {
#if defined(LONGROPE_INTEGER_DECODE)
        Buffer<float> exact = zeros(2 * half);
        for (int key = 0; key < kDecodeMostKeys; ++key) {
            fill_angles(exact.get(), key, turns, 1 << kTurnBits);
            store_short_row(to + key * 2 * half, [&](int64_t at) { return load<vf>(exact.get() + at); });
        }
#else
        (void)to, (void)turns;
#endif
    }

    // Dims of a row as fp32: the first of each pair, the second, and what does not rotate.
    template <class S>
    void spread(const S* row, float* to) const {
        if (p.rotation.interleaved) {
            for (int64_t i = 0; i < pairs; ++i) to[i] = widen(row[2 * i]);
            for (int64_t i = 0; i < pairs; ++i) to[half + i] = widen(row[2 * i + 1]);
        } else {
            for (int64_t i = 0; i < pairs; ++i) to[i] = widen(row[i]);
            for (int64_t i = 0; i < pairs; ++i) to[half + i] = widen(row[pairs + i]);
        }
        for (int64_t i = 2 * pairs; i < p.head_dim; ++i) to[2 * half + i - 2 * pairs] = widen(row[i]);
    }

    void spread_queries(Workspace& w) const {
        for (int r = 0; r < w.rows; ++r) {
            const int64_t row = w.first_row + r;
            spread(row_of<T>(p.query, w.b, w.head * group + row % group, query_row(p, w.b, row / group)),
                   w.unrotated.get() + r * width);
            if (integers) measure_query(w, r);
        }
    }

    // The largest value of a query row and the norms of its pairs as parts of it.
    void measure_query(Workspace& w, int r) const {
        const float* query = w.unrotated.get() + r * width;
        vf top = splat(0.0f);
        for (int64_t i = 0; i < width; i += kLanes) top = vmax(vmax(load<vf>(query + i), -load<vf>(query + i)), top);
        w.largest_query[r] = reduce_max(top);
        for (int64_t i = 0; i < half; i += kLanes) {
            const vf a = load<vf>(query + i) / w.largest_query[r], b = load<vf>(query + half + i) / w.largest_query[r];
            store(w.pair_norms.get() + r * half + i, vsqrt(a * a + b * b));
        }
    }

#if defined(LONGROPE_INTEGER_DECODE)
    // A row of int16 in the order in which keys are unpacked, of vectors dims(at).
    template <class Dims>
    void store_short_row(int16_t* to, const Dims& dims) const {
        for (int64_t at = 0; at < 2 * half; at += kLanes) {
            if (fills_widest(half))
                store_unpacked<kIntegerBytes>(to, at, dims(at));
            else
                store_unpacked<32>(to, at, dims(at));
        }
    }

    // The scales of a group of keys, as those of the pairs, which go to the query, and what is left for the keys;
    // whether the group is multiplied in integers.
    void split_scales(Workspace& w, const float* scales) const {
        vf top = splat(0.0f), poison = splat(0.0f);
        for (int64_t i = 0; i < half; i += kLanes) {
            const vf pair = vmax(load<vf>(scales + i), load<vf>(scales + half + i));
            poison += (load<vf>(scales + i) + load<vf>(scales + half + i)) * 0.0f;
            top = vmax(top, pair);
            store(w.pair_scales.get() + i, pair);
        }
        w.largest_scale = reduce_max(top) + reduce_add(poison);
        store_short_row(w.ratios.get(), [&](int64_t at) {
            const vf pair = load<vf>(w.pair_scales.get() + at % half);
            return pair > 0.0f ? load<vf>(scales + at) / pair * float{1 << kTurnBits} : splat(0.0f);
        });
        for (int64_t i = 0; i < half; i += kLanes)
            store(w.pair_scales.get() + i, load<vf>(w.pair_scales.get() + i) / w.largest_scale);
        w.group_in_integers = true;
        for (int r = 0; r < w.rows; ++r) w.group_in_integers &= measure_products(w, r);
    }

    // The norm of a query times the scales, as part of what the largest of both would give. False where rounding to a
    // part of that norm would show: where scores in the hundreds are possible, products that cancel are far smaller
    // than what they are rounded to. False too of what is zero, hardly a number or none.
    bool measure_products(Workspace& w, int r) const {
        const float* pairs_of_row = w.pair_norms.get() + r * half;
        vf top = splat(0.0f), squares = splat(0.0f);
        for (int64_t i = 0; i < half; i += kLanes)
            top = vmax(top, load<vf>(w.pair_scales.get() + i) * load<vf>(pairs_of_row + i));
        const float largest = reduce_max(top);
        for (int64_t i = 0; i < half; i += kLanes) {
            const vf part = load<vf>(w.pair_scales.get() + i) * load<vf>(pairs_of_row + i) / largest;
            squares += part * part;
        }
        const float factor = p.rotation.attention_factor[p.rotation.regime_index[w.b]];
        const float norm = largest * std::sqrt(reduce_add(squares));
        w.product_norms[r] = norm;
        w.product_sizes[r] = w.largest_query[r] * w.largest_scale * (factor * factor);
        const float score = std::fabs(p.scale) * w.product_sizes[r] * norm * key_norm(p.head_dim);
        return norm > 1e-30f && w.largest_query[r] * factor > 1e-30f && w.product_sizes[r] > 1e-30f &&
               score <= most_query_norm(p.head_dim) / 32;
    }

    // The rotated query rows, times the scales of the pairs, as int16 of the largest norm that sums allow.
    void round_queries(Workspace& w) const {
        const float factor = p.rotation.attention_factor[p.rotation.regime_index[w.b]];
        const float most = most_query_norm(p.head_dim);
        for (int r = 0; r < w.rows; ++r) {
            const float of_query = 1.0f / (w.largest_query[r] * factor), of_norm = most / w.product_norms[r];
            const float* query = w.query.get() + r * width;
            store_short_row(w.short_query.get() + r * 2 * half, [&](int64_t at) {
                return load<vf>(query + at) * of_query * (load<vf>(w.pair_scales.get() + at % half) * of_norm);
            });
            w.score_scales[r] = w.product_sizes[r] * (w.product_norms[r] / (most * (1 << kKeyBits)));
        }
    }

    // Weights as int16 of the block's largest, in the place of the scores.
    template <int Vectors>
    void round_weights(Workspace& w, int r, const vf* x) const {
        vu top = {};  // none is negative, so that their bits are in order, those of a NaN above all
        for (int n = 0; n < Vectors; ++n) {
            const vu bits = (vu)x[n];
            top = bits > top ? bits : top;
        }
        for (int step = kLanes / 2; step; step /= 2) {
            const vu other = (vu)turned((vf)top, step);
            top = other > top ? other : top;
        }
        const float most = ((vf)top)[0];
        const float inverse = most >= std::numeric_limits<float>::min() ? 1.0f / most : 0.0f;
        w.weight_scales[r] = most * (1.0f / kMostInt16);
        int16_t* weights = reinterpret_cast<int16_t*>(w.scores.get() + r * kDecodeMostKeys);
        for (int n = 0; n < Vectors; ++n) store_int16(weights + n * kLanes, x[n] * inverse * kMostInt16);
    }

    template <int R>
    void add_integers(Workspace& w, int row, int count, float* out) const {
        const int16_t* weights = reinterpret_cast<const int16_t*>(w.scores.get() + row * kDecodeMostKeys);
        const auto call = [&](auto add) {
            add(w.values, count, p.head_dim, weights, 2 * kDecodeMostKeys, w.weight_scales + row, out + row * columns,
                columns, row == 0 ? w.next_keys : nullptr);
        };
        if (fills_widest(p.head_dim))
            call(add_int8<R, kIntegerBytes>);
        else
            call(add_int8<R, 32>);
    }

    template <int R>
    void score_integers(Workspace& w, int row, int count, bool base) const {
        const int16_t* table = short_tables.get() + (2 * p.rotation.regime_index[w.b] + base) * short_table_elements();
        const int16_t* query = w.short_query.get() + row * 2 * half;
        const Ahead ahead = row == 0 ? Ahead{w.values, w.next_keys} : Ahead{};
        const auto call = [&](auto score) {
            score(w.keys, count, table, w.ratios.get(), query, w.score_scales + row,
                  w.scores.get() + row * kDecodeMostKeys, kDecodeMostKeys, ahead);
        };
        constexpr int kWide = kIntegerBytes;
        if (half == 32)
            call(score_int8<R, 32, 1>);
        else if (half == 64)
            call(score_int8<R, kWide, 64 / kWide>);
        else
            call(score_int8<R, kWide, 128 / kWide>);
    }
#endif

    // Query rows rotated for a block that begins at key `key`: from the exact angles of the run's beginning by a step
    // that all runs share, or, where frequencies differ on the way, by exact angles of their own.
    void rotate_queries(Workspace& w, int64_t key, bool base) const {
        const int64_t regime = p.rotation.regime_index[w.b], offset = key % kDecodeRun;
        const int64_t begin = key - offset;
        if (begin < p.rotation.start_tokens[regime]) return rotate_exactly(w, key, base, w.query.get());
        if (w.run_begin != begin) {
            rotate_exactly(w, begin, false, w.at_run.get());
            w.run_begin = begin;
        }
        const float* step = steps.get() + regime * step_elements() + offset / kDecodeKeys * 2 * half;
        for (int r = 0; r < w.rows; ++r) turn_row(w.at_run.get() + r * width, step, w.query.get() + r * width);
    }

    void turn_row(const float* from, const float* cosines, float* to) const {
        for (int64_t i = 0; i < half; i += kLanes) {
            const vf x = load<vf>(from + i), y = load<vf>(from + half + i);
            const vf c = load<vf>(cosines + i), s = load<vf>(cosines + half + i);
            store(to + i, x * c - y * s);
            store(to + half + i, y * c + x * s);
        }
        std::memcpy(to + 2 * half, from + 2 * half, sizeof(float) * rest);
    }

    // Every query row rotated by its own angle less that of key position `origin`.
    void rotate_exactly(Workspace& w, int64_t origin, bool base_key, float* rotated) const {
        const int64_t regime = p.rotation.regime_index[w.b];
        const int64_t* scaled = p.rotation.turns + regime * pairs;
        const int64_t* base = p.rotation.base_turns + regime * pairs;
        const int64_t* key_turns = base_key ? base : scaled;
        const float factor = p.rotation.attention_factor[regime];
        float *cosines = w.angles.get(), *sines = cosines + half;
        for (int r = 0; r < w.rows; ++r) {
            if (const int64_t row = w.first_row + r; r == 0 || row % group == 0) {
                const int64_t position = query_position(p, w.b, row / group);
                const int64_t* turns = position < p.rotation.start_tokens[regime] ? base : scaled;
                for (int64_t i = 0; i < pairs; ++i) {
                    const uint64_t angle = static_cast<uint64_t>(position) * static_cast<uint64_t>(turns[i]) -
                                           static_cast<uint64_t>(origin) * static_cast<uint64_t>(key_turns[i]);
                    const CosSin value = cos_sin(static_cast<int32_t>(angle >> 32));
                    cosines[i] = value.cos * factor;
                    sines[i] = value.sin * factor;
                }
            }
            turn_row(w.unrotated.get() + r * width, cosines, rotated + r * width);
        }
    }

    // Scores of R rows with `count` keys at w.keys.
    template <int R, class S, int Form>
    __attribute__((noinline)) void score_group(Workspace& w, int first_row, int count, const float* table,
                                               const float* scales) const {
        constexpr bool InPlace = Form != kSpread;
        const float* query = w.query.get() + first_row * width;
        vf* sums = reinterpret_cast<vf*>(w.sums.get());
        const int64_t bytes = p.head_dim * static_cast<int64_t>(quantised(p) ? sizeof(int8_t) : sizeof(T));
        constexpr int kTogether = InPlace && R <= 4 && kLanes == 16 ? 2 : 1;  // keys that share a query in registers
        for (int k = 0; k < count; k += kLanes) {
            const int here = std::min(kLanes, count - k);
            int lane = 0;
            for (; lane + kTogether <= here; lane += kTogether) {
                if (first_row == 0)
                    for (int j = 0; j < kTogether; ++j) {
                        prefetch_row(w.values[k + lane + j], 0, bytes);
                        prefetch_row(w.next_keys[k + lane + j], 0, bytes / 2);
                    }
                score_keys<R, S, Form, kTogether>(w, query, k + lane, table, scales, sums + lane);
            }
            for (; lane < here; ++lane) score_keys<R, S, Form, 1>(w, query, k + lane, table, scales, sums + lane);
            for (lane = here; lane < kLanes; ++lane)
                for (int r = 0; r < R; ++r) sums[r * kLanes + lane] = splat(0.0f);
            for (int r = 0; r < R; ++r)
                store(w.scores.get() + (first_row + r) * kDecodeMostKeys + k, lane_sums(sums + r * kLanes));
        }
    }

    // Products of R rows with keys k, k + 1, ... (Together of them), by lane: sums[r * kLanes + key].
    template <int R, class S, int Form, int Together>
    __attribute__((always_inline)) void score_keys(Workspace& w, const float* query, int k, const float* table,
                                                   const float* scales, vf* sums) const {
        constexpr bool InPlace = Form != kSpread;
        const int64_t half = Form > 0 ? Form : this->half, pairs = Form > 0 ? Form : this->pairs;
        const int64_t width = Form > 0 ? 2 * Form : this->width;
        const S* rows[Together];
        const float* cosines[Together];
        vf sum[Together][R];
#pragma GCC unroll 2
        for (int j = 0; j < Together; ++j) {
            rows[j] = static_cast<const S*>(w.keys[k + j]);
            cosines[j] = table + (k + j) * 2 * half;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[j][r] = splat(0.0f);
        }
        float* buffer = w.row.get();
        if constexpr (!InPlace) spread(rows[0], buffer);
        const auto dims = [&](int j, int64_t at_row, int64_t at_buffer) {
            vf x;
            if constexpr (InPlace)
                x = widen_lanes(rows[j] + at_row);
            else
                x = load<vf>(buffer + at_buffer);
            if constexpr (std::is_same_v<S, int8_t>) x *= load<vf>(scales + at_buffer);
            return x;
        };
        for (int64_t i = 0; i < half; i += kLanes) {
            vf u[Together], v[Together];
#pragma GCC unroll 2
            for (int j = 0; j < Together; ++j) {
                const vf x = dims(j, i, i), y = dims(j, pairs + i, half + i);
                const vf c = load<vf>(cosines[j] + i), s = load<vf>(cosines[j] + half + i);
                u[j] = x * c - y * s;
                v[j] = y * c + x * s;
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const vf a = in_register(load<vf>(query + r * width + i));
                const vf b = in_register(load<vf>(query + r * width + half + i));
#pragma GCC unroll 2
                for (int j = 0; j < Together; ++j) sum[j][r] = b * v[j] + (a * u[j] + sum[j][r]);
            }
        }
        for (int64_t i = 2 * half; i < width; i += kLanes) {
#pragma GCC unroll 2
            for (int j = 0; j < Together; ++j) {
                const vf x = dims(j, 2 * pairs + i - 2 * half, i);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[j][r] = load<vf>(query + r * width + i) * x + sum[j][r];
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < Together; ++j)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r * kLanes + j] = sum[j][r];
    }

    // Adds `count` values, weighted, to the outputs of R rows. Weights are zero past `count`, to a multiple of 2.
    template <int R, class S>
    __attribute__((noinline)) void add_values(const Workspace& w, int first_row, int count, float* out) const {
        constexpr int kWide = R > 4 ? 2 : 4;
        for (int64_t c = 0; c < columns; c += kWide * kLanes) {
            if (c + kWide * kLanes <= p.head_dim)
                add_columns<R, S, kWide, true>(w, first_row, count, c, out);
            else
                for (int64_t one = c; one < columns; one += kLanes) {
                    if (one + kLanes <= p.head_dim)
                        add_columns<R, S, 1, true>(w, first_row, count, one, out);
                    else
                        add_columns<R, S, 1, false>(w, first_row, count, one, out);
                }
        }
    }

    template <int R, class S, int Wide, bool Whole>
    void add_columns(const Workspace& w, int first_row, int count, int64_t c, float* out) const {
        vf acc[R][Wide];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < Wide; ++n) acc[r][n] = load<vf>(out + (first_row + r) * columns + c + n * kLanes);
        S edge[2][kLanes] = {};
        const int64_t bytes = p.head_dim * static_cast<int64_t>(sizeof(S));
        const auto row_of_key = [&](int k, int side) {
            const S* row = static_cast<const S*>(w.values[k]) + c;
            if constexpr (!Whole) {
                for (int64_t i = 0; i < p.head_dim - c; ++i) edge[side][i] = row[i];
                row = edge[side];
            }
            return row;
        };
#if defined(__AVX512BF16__)
        if constexpr (multiplies_pairs<T>()) {
            const uint32_t* weights = reinterpret_cast<const uint32_t*>(w.scores.get() + first_row * kDecodeMostKeys);
            for (int k = 0; k < count; k += 2) {
                const S* low = row_of_key(k, 0);
                const S* high = row_of_key(std::min(k + 1, count - 1), 1);  // its weight is 0 past the end
                if (c == 0 && first_row == 0) {
                    prefetch_row(w.next_keys[k], bytes / 2, bytes);
                    prefetch_row(w.next_keys[std::min(k + 1, count - 1)], bytes / 2, bytes);
                }
                __m512bh value[Wide];
                if constexpr (Wide > 1) {
#pragma GCC unroll 2
                    for (int n = 0; n < Wide; n += 2) paired(low + n * kLanes, high + n * kLanes, value + n);
                } else {
                    value[0] = paired(low, high);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[r * kDecodeMostKeys + k / 2]);
#pragma GCC unroll 4
                    for (int n = 0; n < Wide; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], weight, value[n]);
                }
            }
        } else
#endif
            for (int k = 0; k < count; ++k) {
                const S* row = row_of_key(k, 0);
                if (c == 0 && first_row == 0) prefetch_row(w.next_keys[k], bytes / 2, bytes);
                vf value[Wide];
#pragma GCC unroll 4
                for (int n = 0; n < Wide; ++n) value[n] = widen_lanes(row + n * kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const vf weight = splat(w.scores[(first_row + r) * kDecodeMostKeys + k]);
#pragma GCC unroll 4
                    for (int n = 0; n < Wide; ++n) acc[r][n] = value[n] * weight + acc[r][n];
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < Wide; ++n) store(out + (first_row + r) * columns + c + n * kLanes, acc[r][n]);
    }

#if defined(__AVX512BF16__)
    // Values of two neighbouring keys side by side, column by column. int8 is exact in bf16.
    static __m512bh paired(const BFloat16* low, const BFloat16* high) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
        return (__m512bh)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    }
    static __m512bh paired(const int8_t* low, const int8_t* high) {
        const __m512i a = (__m512i)widen_lanes(low), b = (__m512i)widen_lanes(high);
        return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(a, 16), b);
    }

    // The same for two vectors of columns.
    static void paired(const BFloat16* low, const BFloat16* high, __m512bh* to) {
        const auto interleaved = [](int first) {
            typedef int16_t Words __attribute__((vector_size(64)));
            Words order;
            for (int i = 0; i < 2 * kLanes; ++i) order[i] = static_cast<int16_t>(first + i / 2 + i % 2 * 2 * kLanes);
            return (__m512i)order;
        };
        const __m512i a = load<__m512i>(low), b = load<__m512i>(high);
        to[0] = (__m512bh)_mm512_permutex2var_epi16(a, interleaved(0), b);
        to[1] = (__m512bh)_mm512_permutex2var_epi16(a, interleaved(kLanes), b);
    }
    static void paired(const int8_t* low, const int8_t* high, __m512bh* to) {
        to[0] = paired(low, high);
        to[1] = paired(low + kLanes, high + kLanes);
    }
#endif

    // Calls call(first row, rows as a constant) for groups of at most `Most` rows.
    template <int Most = kDecodeGroup, class Call>
    static void by_group(int rows, const Call& call) {
        for (int first = 0, size; first < rows; first += size) {
            size = decode_group(std::min(rows - first, Most));
            const auto is = [&](auto constant) {
                if constexpr (constant.value <= Most)
                    if (size == constant.value) call(first, constant);
            };
            is(std::integral_constant<int, 1>());
            is(std::integral_constant<int, 2>());
            is(std::integral_constant<int, 3>());
            is(std::integral_constant<int, 4>());
            is(std::integral_constant<int, 6>());
            is(std::integral_constant<int, 8>());
        }
    }

    // Partial result of a run: [rows] largest log2 scores, [rows] sums, [rows][columns] outputs.
    void attend_run(Workspace& w, int64_t run, float* partial) const {
        float *largest = partial, *sums = partial + most_rows, *out = partial + 2 * most_rows;
        std::fill(largest, largest + most_rows, -std::numeric_limits<float>::infinity());
        std::memset(sums, 0, sizeof(float) * most_rows * (columns + 1));
        int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
        for (int r = 0; r < w.rows; ++r)
            if (w.high[r] > w.low[r]) {
                first = std::min(first, w.low[r]);
                last = std::max(last, w.high[r]);
            }
        first = std::max(first, run * kDecodeRun);
        last = std::min(last, (run + 1) * kDecodeRun);
        if (first >= last) return;
        spread_queries(w);
        for (int r = 0; r < w.rows; ++r) w.row_sums[r] = splat(0.0f);
        const int64_t length = p.key_length[w.b], start = p.rotation.start_tokens[p.rotation.regime_index[w.b]];
        // Blocks begin at multiples of their size whatever is visible, and once more at n-hat.
        const auto size_of_block = [&](int64_t key) {
            if (!quantised(p) || key >= quantised_keys(p, w.b)) return kDecodeKeys;
            take_scales(w, key);
            return w.group_in_integers ? kDecodeMostKeys : kDecodeKeys;
        };
        for (int64_t key = first - first % size_of_block(first); key < last;) {
            const bool base = key < start;
            const int64_t size = size_of_block(key);
            int64_t end = std::min((key / size + 1) * size, length);
            if (base) end = std::min(end, start);
            attend_block(w, key, static_cast<int>(end - key), base, largest, out);
            key = end;
        }
        for (int r = 0; r < w.rows; ++r) sums[r] = reduce_add(w.row_sums[r]);
#if defined(LONGROPE_INTEGER_DECODE)
        if (integers)
            for (int r = 0; r < w.rows; ++r) {
                if (fills_widest(p.head_dim))
                    in_order_of_dims<kIntegerBytes>(out + r * columns, p.head_dim);
                else
                    in_order_of_dims<32>(out + r * columns, p.head_dim);
            }
#endif
    }

    // Where the rows of keys lie, or of their values.
    template <class S>
    void fill_rows(const Operand& x, const Workspace& w, int64_t key, int count, const void** rows) const {
        for_slots(p, w.b, key, count, [&](int k, int run, const Slot& slot) {
            const S* row = row_of<S>(x, slot.outer, w.head, slot.token);
            for (int i = 0; i < run; ++i) rows[k + i] = row + i * x.token_stride;
        });
    }

    // Where the rows of the next keys lie, to ask for them early; of these keys again where there are no more.
    template <class S>
    void look_ahead(Workspace& w, int64_t key, int count) const {
        const int64_t length = quantised(p) ? quantised_keys(p, w.b) : p.key_length[w.b];
        const int ahead = static_cast<int>(std::clamp<int64_t>(length - key - count, 0, count));
        fill_rows<S>(p.key, w, key + count, ahead, w.next_keys);
        for (int k = ahead; k < count; ++k) w.next_keys[k] = w.keys[k];
    }

    // The scales of the channels of a key's group, spread out behind a row.
    void take_scales(Workspace& w, int64_t key) const {
        const int64_t of = key / kKeyGroup * kKeyGroup;
        if (w.scales_of == of) return;
        float* scales = w.row.get() + width;
        spread(key_scale(p, slot_of(p, w.b, key), w.head), scales);
        w.scales_of = of;
        w.group_in_integers = false;
#if defined(LONGROPE_INTEGER_DECODE)
        if (integers) split_scales(w, scales);
#endif
    }

    void attend_block(Workspace& w, int64_t key, int count, bool base, float* largest, float* out) const {
        if (!quantised(p)) {
            fill_rows<T>(p.key, w, key, count, w.keys);
            fill_rows<T>(p.value, w, key, count, w.values);
            look_ahead<T>(w, key, count);
            return attend_block_of<T, T>(w, key, count, base, nullptr, largest, out);
        }
        fill_rows<int8_t>(p.key, w, key, count, w.keys);
        fill_rows<int8_t>(p.value, w, key, count, w.values);
        for_slots(p, w.b, key, count, [&](int k, int run, const Slot& slot) {
            std::memcpy(w.value_scales + k, value_scales(p, slot, w.head), sizeof(float) * run);
        });
        std::fill(w.value_scales + count, w.value_scales + kDecodeMostKeys, 0.0f);
        if (key >= quantised_keys(p, w.b)) {
            for (int k = 0; k < count; ++k) w.keys[k] = row_of<T>(p.pages.key_tail, w.b, w.head, (key + k) % kKeyGroup);
            look_ahead<int8_t>(w, key, count);
            return attend_block_of<T, int8_t>(w, key, count, base, nullptr, largest, out);
        }
        look_ahead<int8_t>(w, key, count);
        attend_block_of<int8_t, int8_t>(w, key, count, base, w.row.get() + width, largest, out);
    }

    template <class KeyT, class ValueT>
    void attend_block_of(Workspace& w, int64_t key, int count, bool base, const float* scales, float* largest,
                         float* out) const {
        const int64_t regime = p.rotation.regime_index[w.b];
        const float* table = tables.get() + (2 * regime + base) * table_elements();
        rotate_queries(w, key, base);
        constexpr bool kInt8Keys = std::is_same_v<KeyT, int8_t>, kInt8Values = std::is_same_v<ValueT, int8_t>;
#if defined(LONGROPE_INTEGER_DECODE)
        if (kInt8Keys && w.group_in_integers) {
            round_queries(w);
            by_group(w.rows, [&](int row, auto size) { score_integers<size.value>(w, row, count, base); });
        } else
#endif
            by_group(w.rows, [&](int row, auto size) {
                if (!in_place)
                    score_group<size.value, KeyT, kSpread>(w, row, count, table, scales);
                else if (rest == 0 && half == 64)
                    score_group<size.value, KeyT, 64>(w, row, count, table, scales);
                else if (rest == 0 && half == 32)
                    score_group<size.value, KeyT, 32>(w, row, count, table, scales);
                else
                    score_group<size.value, KeyT, kInPlace>(w, row, count, table, scales);
            });
        const auto softmax = [&](auto keys) {
            bool whole = p.softcap == 0.0f && count == keys.value;
            for (int r = 0; r < w.rows; ++r) whole &= w.low[r] <= key && key + count <= w.high[r];
            for (int r = 0; r < w.rows; ++r) {
                if (whole)
                    softmax_row<keys.value, true, kInt8Values>(w, r, key, count, largest, out + r * columns);
                else
                    softmax_row<keys.value, false, kInt8Values>(w, r, key, count, largest, out + r * columns);
            }
        };
        if (count > kDecodeKeys)
            softmax(std::integral_constant<int, kDecodeMostKeys>());
        else
            softmax(std::integral_constant<int, kDecodeKeys>());
#if defined(LONGROPE_INTEGER_DECODE)
        if (kInt8Values && integers) {
            by_group<kInt8Rows>(w.rows, [&](int row, auto size) { add_integers<size.value>(w, row, count, out); });
            return;
        }
#endif
        by_group(w.rows, [&](int row, auto size) { add_values<size.value, ValueT>(w, row, count, out); });
    }

    // Scores of a row become weights of the values, and what was summed before is scaled to the new maximum.
    // Keys: of a block, at most; scores past `count` are whatever lay there, and hidden. Whole: all are there and
    // visible, and there is no softcap. Int8Values: weights are multiplied by the values' scales.
    template <int Keys, bool Whole, bool Int8Values>
    void softmax_row(Workspace& w, int r, int64_t key, int count, float* largest, float* out) const {
        constexpr int kVectors = Keys / kLanes;
        const vf hidden = splat(-std::numeric_limits<float>::infinity());
        float* scores = w.scores.get() + r * kDecodeMostKeys;
        vf x[kVectors];
        vf top = hidden;
        for (int n = 0; n < kVectors; ++n) {
            x[n] = load<vf>(scores + n * kLanes);
            if constexpr (Whole) {
                x[n] *= p.scale * kLog2E;
            } else {
                x[n] = p.softcap > 0.0f ? tanhv(x[n] * (p.scale / p.softcap)) * (p.softcap * kLog2E)
                                        : x[n] * (p.scale * kLog2E);
                const vi column = iota() + n * kLanes;
                const int least = static_cast<int>(std::clamp<int64_t>(w.low[r] - key, 0, count));
                const int most = static_cast<int>(std::clamp<int64_t>(w.high[r] - key, 0, count));
                x[n] = (column >= least) & (column < most) ? x[n] : hidden;
            }
            top = vmax(top, x[n]);
        }
        const float now = std::max(largest[r], reduce_max(top));
        const float shift = std::isinf(now) ? 0.0f : now;
        vf& sum = w.row_sums[r];
        if (now > largest[r]) {
            const float scale = exp2v(splat(largest[r] - shift))[0];
            largest[r] = now;
            sum *= scale;
            for (int64_t c = 0; c < columns; ++c) out[c] *= scale;
        }
        for (int n = 0; n < kVectors; ++n) {
            x[n] = exp2v(x[n] - shift);
            sum += x[n];
            if constexpr (Int8Values) x[n] *= load<vf>(w.value_scales + n * kLanes);
        }
#if defined(LONGROPE_INTEGER_DECODE)
        if (Int8Values && integers) return round_weights<kVectors>(w, r, x);
#endif
        for (int n = 0; n < kVectors; ++n) store(scores + n * kLanes, x[n]);
#if defined(__AVX512BF16__)
        if constexpr (multiplies_pairs<T>())
            for (int n = 0; n < kVectors; n += 2)
                store(scores + n / 2 * kLanes, (__m512i)_mm512_cvtne2ps_pbh(x[n + 1], x[n]));
#endif
    }

    void merge(int64_t b, int64_t head, int64_t first_row, const float* partial, int64_t run_elements) const {
        std::vector<float> total(columns);
        const int rows = static_cast<int>(std::min<int64_t>(row_count(b) - first_row, kDecodeRows));
        const int64_t count = runs(b);
        for (int r = 0; r < rows; ++r) {
            float top = -std::numeric_limits<float>::infinity();
            for (int64_t run = 0; run < count; ++run) top = std::max(top, partial[run * run_elements + r]);
            float sum = 0.0f;
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t run = 0; run < count; ++run) {
                const float* from = partial + run * run_elements;
                const float scale = std::isinf(from[r]) ? 0.0f : exp2v(splat(from[r] - top))[0];
                sum += from[most_rows + r] * scale;
                for (int64_t c = 0; c < columns; ++c) total[c] += from[2 * most_rows + r * columns + c] * scale;
            }
            const bool seen = sum != 0.0f;  // also where a score is not a number: then neither is the result
            const int64_t i = (first_row + r) / group, query_head = head * group + (first_row + r) % group;
            T* to = const_cast<T*>(row_of<T>(p.out, b, query_head, query_row(p, b, i)));
            for (int64_t d = 0; d < p.head_dim; ++d) narrow(seen ? total[d] / sum : 0.0f, to + d);
            p.lse[lse_index(p, b, query_head, i)] =
                seen ? static_cast<float>(top * natural_units(p) + std::log(static_cast<double>(sum)))
                     : -std::numeric_limits<float>::infinity();
        }
    }
};

// Whether the decoder serves sequence b: few rows, and keys at consecutive positions. Depends on the sequence alone.
inline bool decodes(const AttentionParams& p, int64_t b) {
    return p.key_heads > 0 && p.query_heads / p.key_heads * query_count(p, b) <= kDecodeMostRows &&
           p.key_positions == nullptr;
}

}  // namespace
}  // namespace longrope
