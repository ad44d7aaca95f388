// Attention of a few query rows over many keys, for one instruction set: decoding, speculative decoding, short chunks.
//
// One pass over the cache and no packing. Keys are split by index into runs of 2048, a task each, so that the bits do
// not depend on how many threads there are; the runs' partial outputs are merged in order. Within a run, keys at
// consecutive positions p0 + j (64 of them) share their rotation: the query is rotated by its distance to p0, and key j
// by the angle of j alone, from a table that all runs share. No sine or cosine is computed for a key. Runs split at
// n-hat, where the frequencies change.
//
// Bytes: each key and value is read once for all query heads that share it. Operations: for a pair of key and query
// row, about 4 head_dim, and 6 for the rotation of each pair of dims of a key. Bound by memory for up to about 8 rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "tile.h"

namespace longrope {
namespace {

constexpr int kDecodeRows = 16;       // query rows of a key head at most
constexpr int kDecodeGroup = 8;       // rows whose sums are in registers at once
constexpr int kDecodeKeys = 64;       // keys that share a query rotation
constexpr int64_t kDecodeRun = 2048;  // keys of a task

// Lane k of the result is the sum of the lanes of v[k].
inline vf sums_of(const vf* v) {
    vf level[kLanes];
    for (int i = 0; i < kLanes; ++i) level[i] = v[i];
    vi even, odd;
    for (int i = 0; i < kLanes; ++i) {
        even[i] = 2 * i;  // of two vectors side by side
        odd[i] = 2 * i + 1;
    }
    for (int count = kLanes; count > 1; count /= 2)
        for (int i = 0; i < count / 2; ++i)
            level[i] = __builtin_shuffle(level[2 * i], level[2 * i + 1], even) +
                       __builtin_shuffle(level[2 * i], level[2 * i + 1], odd);
    return level[0];
}

template <class T>
class Decoder {
  public:
    explicit Decoder(const AttentionParams& params)
        : p(params),
          pairs(p.rotation.pairs),
          half(pad(pairs)),
          rest(pad(p.head_dim - 2 * pairs)),
          width(2 * half + rest),
          columns(pad(p.head_dim)),
          group(p.query_heads / p.key_heads),
          rows(static_cast<int>(group * p.query_tokens)),
          regimes(1) {
        for (int64_t b = 0; b < p.batch; ++b) {
            runs_of_sequence = std::max(runs_of_sequence, (p.key_length[b] + kDecodeRun - 1) / kDecodeRun);
            regimes = std::max<int64_t>(regimes, p.rotation.regime_index[b] + 1);
        }
        fill_tables();
    }

    void run() {
        const int64_t pairs_of_heads = p.batch * p.key_heads;
        const Buffer<float> partial = allocate<float>(pairs_of_heads * runs_of_sequence * rows * (columns + 2));
        std::atomic<int64_t> next{0};
        const int64_t tasks = pairs_of_heads * runs_of_sequence;
        const auto at = [&](int64_t pair, int64_t run) {
            return partial.get() + (pair * runs_of_sequence + run) * rows * (columns + 2);
        };
        run_workers(static_cast<int>(std::min<int64_t>(p.threads, tasks)), [&](int) {
            Workspace w(*this);
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
                const int64_t pair = task / runs_of_sequence, run = task % runs_of_sequence;
                attend_run(w, pair / p.key_heads, pair % p.key_heads, run, at(pair, run));
            }
        });
        for (int64_t pair = 0; pair < pairs_of_heads; ++pair)
            merge(pair / p.key_heads, pair % p.key_heads, at(pair, 0));
    }

  private:
    const AttentionParams& p;
    int64_t pairs, half, rest, width, columns, group;
    int rows;
    int64_t regimes, runs_of_sequence = 1;
    std::vector<float> tables;  // [regime][scaled or base][key][cos of half, sin of half]

    static int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
    int64_t table_elements() const { return int64_t{kDecodeKeys} * 2 * half; }

    struct Workspace {
        Buffer<float> query;   // [rows][width]: first halves of the pairs, second halves, the rest; rotated for a run
        Buffer<float> key;     // [width]
        Buffer<float> scores;  // [rows][kDecodeKeys]
        Buffer<float> sums;    // [kDecodeGroup][kLanes vectors]
        explicit Workspace(const Decoder& d)
            : query(allocate<float>(d.rows * d.width)),
              key(allocate<float>(d.width)),
              scores(allocate<float>(d.rows * kDecodeKeys)),
              sums(allocate<float>(kDecodeGroup * kLanes * kLanes)) {
            std::memset(query.get(), 0, sizeof(float) * d.rows * d.width);
            std::memset(key.get(), 0, sizeof(float) * d.width);
        }
    };

    void fill_tables() {
        tables.assign(regimes * 2 * table_elements(), 0.0f);
        for (int64_t regime = 0; regime < regimes; ++regime)
            for (int base = 0; base < 2; ++base) {
                const int64_t* turns = (base ? p.rotation.base_turns : p.rotation.turns) + regime * pairs;
                float* to = tables.data() + (2 * regime + base) * table_elements();
                const float factor = p.rotation.attention_factor[regime];
                for (int key = 0; key < kDecodeKeys; ++key)
                    for (int64_t i = 0; i < pairs; ++i) {
                        const CosSin value = cos_sin(phase_of(key, turns[i]));
                        to[key * 2 * half + i] = value.cos * factor;
                        to[key * 2 * half + half + i] = value.sin * factor;
                    }
            }
    }

    // Dims of a row as fp32: the first of each pair, the second, and what does not rotate.
    void spread(const T* row, float* to) const {
        if (p.rotation.interleaved) {
            for (int64_t i = 0; i < pairs; ++i) to[i] = widen(row[2 * i]);
            for (int64_t i = 0; i < pairs; ++i) to[half + i] = widen(row[2 * i + 1]);
        } else {
            for (int64_t i = 0; i < pairs; ++i) to[i] = widen(row[i]);
            for (int64_t i = 0; i < pairs; ++i) to[half + i] = widen(row[pairs + i]);
        }
        for (int64_t i = 2 * pairs; i < p.head_dim; ++i) to[2 * half + i - 2 * pairs] = widen(row[i]);
    }

    // Rotates every query row by its own angle less that of key position `origin`.
    void rotate_queries(Workspace& w, int64_t b, int64_t head, int64_t origin, bool base_key) const {
        const int64_t regime = p.rotation.regime_index[b];
        const int64_t* scaled = p.rotation.turns + regime * pairs;
        const int64_t* base = p.rotation.base_turns + regime * pairs;
        const int64_t* key_turns = base_key ? base : scaled;
        const float factor = p.rotation.attention_factor[regime];
        for (int r = 0; r < rows; ++r) {
            const int64_t i = r / group;
            const int64_t position =
                p.query_positions ? p.query_positions[b * p.query_tokens + i] : p.query_start[b] + i;
            const int64_t* turns = position < p.rotation.start_tokens[regime] ? base : scaled;
            float* row = w.query.get() + r * width;
            spread(row_of<T>(p.query, b, head * group + r % group, i), row);
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const uint64_t angle = static_cast<uint64_t>(position) * static_cast<uint64_t>(turns[pair]) -
                                       static_cast<uint64_t>(origin) * static_cast<uint64_t>(key_turns[pair]);
                const CosSin value = cos_sin(static_cast<int32_t>(angle >> 32));
                const float x = row[pair], y = row[half + pair];
                row[pair] = (x * value.cos - y * value.sin) * factor;
                row[half + pair] = (y * value.cos + x * value.sin) * factor;
            }
        }
    }

    template <int R>
    void score_group(Workspace& w, int first_row, int64_t b, int64_t head, int64_t first_key, int count,
                     const float* table) const {
        const float* query = w.query.get() + first_row * width;
        float* key = w.key.get();
        vf* sums = reinterpret_cast<vf*>(w.sums.get());
        for (int k = 0; k < count; k += kLanes) {
            const int here = std::min(kLanes, count - k);
            for (int lane = 0; lane < here; ++lane) {
                spread(row_of<T>(p.key, b, head, p.key_start[b] + first_key + k + lane), key);
                const float* cosines = table + (k + lane) * 2 * half;
                const float* sines = cosines + half;
                vf sum[R];
                for (int r = 0; r < R; ++r) sum[r] = splat(0.0f);
                for (int64_t i = 0; i < half; i += kLanes) {
                    const vf x = load<vf>(key + i), y = load<vf>(key + half + i);
                    const vf c = load<vf>(cosines + i), s = load<vf>(sines + i);
                    const vf u = x * c - y * s, v = y * c + x * s;
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        sum[r] = load<vf>(query + r * width + i) * u + sum[r];
                        sum[r] = load<vf>(query + r * width + half + i) * v + sum[r];
                    }
                }
                for (int64_t i = 2 * half; i < width; i += kLanes) {
                    const vf x = load<vf>(key + i);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) sum[r] = load<vf>(query + r * width + i) * x + sum[r];
                }
                for (int r = 0; r < R; ++r) sums[r * kLanes + lane] = sum[r];
            }
            for (int lane = here; lane < kLanes; ++lane)
                for (int r = 0; r < R; ++r) sums[r * kLanes + lane] = splat(0.0f);
            for (int r = 0; r < R; ++r)
                store(w.scores.get() + (first_row + r) * kDecodeKeys + k, sums_of(sums + r * kLanes));
        }
    }

    template <int R>
    void add_values(const Workspace& w, int first_row, int64_t b, int64_t head, int64_t first_key, int count,
                    float* out) const {
        constexpr int kWide = 2;
        for (int64_t c = 0; c < columns; c += kWide * kLanes) {
            const int64_t present = std::min<int64_t>(kWide * kLanes, columns - c);
            vf acc[R][kWide];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < kWide; ++n)
                    acc[r][n] =
                        n * kLanes < present ? load<vf>(out + (first_row + r) * columns + c + n * kLanes) : splat(0);
            const int64_t used = std::min<int64_t>(kWide * kLanes, p.head_dim - c);
            float value[kWide * kLanes] = {};
            for (int k = 0; k < count; ++k) {
                const T* row = row_of<T>(p.value, b, head, p.key_start[b] + first_key + k) + c;
                if (used == kWide * kLanes)
                    for (int i = 0; i < kWide * kLanes; ++i) value[i] = widen(row[i]);
                else
                    for (int64_t i = 0; i < used; ++i) value[i] = widen(row[i]);
                const vf low = load<vf>(value), high = load<vf>(value + kLanes);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const float weight = w.scores[(first_row + r) * kDecodeKeys + k];
                    acc[r][0] = low * weight + acc[r][0];
                    acc[r][1] = high * weight + acc[r][1];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < kWide; ++n)
                    if (n * kLanes < present) store(out + (first_row + r) * columns + c + n * kLanes, acc[r][n]);
        }
    }

    template <class Call>
    void by_group(const Call& call) const {
        for (int first = 0; first < rows; first += kDecodeGroup) {
            switch (std::min(kDecodeGroup, rows - first)) {
                case 1:
                    call(first, std::integral_constant<int, 1>());
                    break;
                case 2:
                    call(first, std::integral_constant<int, 2>());
                    break;
                case 3:
                    call(first, std::integral_constant<int, 3>());
                    break;
                case 4:
                    call(first, std::integral_constant<int, 4>());
                    break;
                case 5:
                    call(first, std::integral_constant<int, 5>());
                    break;
                case 6:
                    call(first, std::integral_constant<int, 6>());
                    break;
                case 7:
                    call(first, std::integral_constant<int, 7>());
                    break;
                default:
                    call(first, std::integral_constant<int, 8>());
                    break;
            }
        }
    }

    void visible(int64_t b, int r, int64_t* low, int64_t* high) const {
        const int64_t index = p.query_start[b] + r / group, length = p.key_length[b];
        *low = p.window_left >= 0 ? std::max<int64_t>(0, index - p.window_left) : 0;
        *high = std::max(p.window_right >= 0 ? std::min(length, index + p.window_right + 1) : length, *low);
    }

    // Partial result of a run: [rows] largest log2 scores, [rows] sums, [rows][columns] outputs.
    void attend_run(Workspace& w, int64_t b, int64_t head, int64_t run, float* partial) const {
        float *largest = partial, *sums = partial + rows, *out = partial + 2 * rows;
        std::fill(largest, largest + rows, -std::numeric_limits<float>::infinity());
        std::memset(sums, 0, sizeof(float) * rows * (columns + 1));
        int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
        for (int r = 0; r < rows; ++r) {
            int64_t low, high;
            visible(b, r, &low, &high);
            if (high > low) {
                first = std::min(first, low);
                last = std::max(last, high);
            }
        }
        first = std::max(first, run * kDecodeRun);
        last = std::min(last, (run + 1) * kDecodeRun);
        const int64_t regime = p.rotation.regime_index[b], start = p.rotation.start_tokens[regime];
        // Blocks begin at multiples of kDecodeKeys whatever is visible, and once more at n-hat.
        for (int64_t key = first / kDecodeKeys * kDecodeKeys; key < last;) {
            const bool base = key < start;
            int64_t end = std::min((key / kDecodeKeys + 1) * kDecodeKeys, p.key_length[b]);
            if (base) end = std::min(end, start);
            attend_block(w, b, head, key, static_cast<int>(end - key), base, largest, sums, out);
            key = end;
        }
    }

    void attend_block(Workspace& w, int64_t b, int64_t head, int64_t key, int count, bool base, float* largest,
                      float* sums, float* out) const {
        const float* table = tables.data() + (2 * p.rotation.regime_index[b] + base) * table_elements();
        rotate_queries(w, b, head, key, base);
        by_group([&](int row, auto size) { score_group<size.value>(w, row, b, head, key, count, table); });
        const vi lane = iota();
        const int padded = static_cast<int>(pad(count));
        for (int r = 0; r < rows; ++r) {
            float* scores = w.scores.get() + r * kDecodeKeys;
            int64_t low, high;
            visible(b, r, &low, &high);
            const int least = static_cast<int>(std::clamp<int64_t>(low - key, 0, count));
            const int most = static_cast<int>(std::clamp<int64_t>(high - key, 0, count));
            vf top = splat(-std::numeric_limits<float>::infinity());
            for (int c = 0; c < padded; c += kLanes) {
                vf x = load<vf>(scores + c);
                x = p.softcap > 0.0f ? tanhv(x * (p.scale / p.softcap)) * (p.softcap * kLog2E) : x * (p.scale * kLog2E);
                const vi column = lane + c;
                x = (column >= least) & (column < most) ? x : splat(-std::numeric_limits<float>::infinity());
                top = vmax(top, x);
                store(scores + c, x);
            }
            const float now = std::max(largest[r], reduce_max(top));
            const float shift = std::isinf(now) ? 0.0f : now;
            const float scale = std::isinf(largest[r]) ? 0.0f : exp2v(splat(largest[r] - shift))[0];
            vf sum = splat(0.0f);
            for (int c = 0; c < padded; c += kLanes) {
                const vf x = exp2v(load<vf>(scores + c) - shift);
                sum += x;
                store(scores + c, x);
            }
            largest[r] = now;
            sums[r] = sums[r] * scale + reduce_add(sum);
            if (scale != 1.0f)
                for (int64_t c = 0; c < columns; ++c) out[r * columns + c] *= scale;
        }
        by_group([&](int row, auto size) { add_values<size.value>(w, row, b, head, key, count, out); });
    }

    void merge(int64_t b, int64_t head, const float* partial) const {
        const int64_t run_elements = rows * (columns + 2);
        std::vector<float> total(columns);
        for (int r = 0; r < rows; ++r) {
            float top = -std::numeric_limits<float>::infinity();
            for (int64_t run = 0; run < runs_of_sequence; ++run) top = std::max(top, partial[run * run_elements + r]);
            const bool seen = !std::isinf(top);
            float sum = 0.0f;
            std::fill(total.begin(), total.end(), 0.0f);
            for (int64_t run = 0; seen && run < runs_of_sequence; ++run) {
                const float* from = partial + run * run_elements;
                const float scale = std::isinf(from[r]) ? 0.0f : exp2v(splat(from[r] - top))[0];
                sum += from[rows + r] * scale;
                for (int64_t c = 0; c < columns; ++c) total[c] += from[2 * rows + r * columns + c] * scale;
            }
            const int64_t i = r / group, query_head = head * group + r % group;
            T* to = const_cast<T*>(row_of<T>(p.out, b, query_head, i));
            for (int64_t d = 0; d < p.head_dim; ++d) narrow(seen ? total[d] / sum : 0.0f, to + d);
            p.lse[(b * p.query_heads + query_head) * p.query_tokens + i] =
                seen ? (top + std::log2(sum)) * kLn2 : -std::numeric_limits<float>::infinity();
        }
    }
};

// True where the decoder serves: few rows, and keys at consecutive positions.
inline bool decodes(const AttentionParams& p) {
    return p.key_heads > 0 && p.query_heads / p.key_heads * p.query_tokens <= kDecodeRows && p.key_positions == nullptr;
}

}  // namespace
}  // namespace longrope
