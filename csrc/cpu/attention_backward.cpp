// Attention backward with rotation fused in, for one instruction set. Probabilities are recomputed from lse; nothing
// rotated is stored between the passes; dq and dk are rotated back as they are written.
//
//   1. attend   a task is one (sequence, key head) and a part of its queries, for all query heads that share the key
//               head, a mebibyte of rows at a time. They are rotated; then key block (192 keys) by key block, rotated
//               and packed, and row block (96 rows of one query head) by row block:
//                   S = Q K^T, dP = dO V^T            strips of 6 rows against panels of keys
//                   P = exp(S - lse), dS = P (dP - D) with D = rowsum(dO O) - dlse
//                   dQ += dS K                        strips of 6 rows against panels of head dims
//                   dV += P^T dO, dK += dS^T Q        strips of 6 keys against panels of head dims
//   2. keys     dK and dV of the parts are added in their order, rotated back and rounded
//
// A product wants one operand in steps (pairs of neighbours along the sum, in bf16) to be broadcast, and one in panels.
// P and dS leave the registers in steps of rows with keys across lanes, which is what the last two products broadcast;
// dS is stored once more in steps of keys for dQ. Q and dO are rows in steps of head dims; their steps of rows are
// interleaved block by block.
// Operations: 10 head_dim per visible score, and about 25 between the products. Bytes: a key block, what lies between
// the products and its gradients stay in L2 while a mebibyte of rows passes from L3, asked for a block ahead; then the
// gradients go back to memory until the next rows of the part. Every sum has one order, whatever the number of threads:
// parts depend on their sequence alone, and blocks ascend.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "tile.h"

namespace longrope {
namespace {

constexpr int kKeys = 192;             // keys in a block
constexpr int kRows = 16 * kTileRows;  // query rows in a block
constexpr int kStrips = kRows / kTileRows, kKeyStrips = kKeys / kTileRows;
constexpr int64_t kTasks = 32;         // of a sequence at least, if it has enough rows: for as many threads
constexpr int64_t kLeastBlocks = 12;   // blocks of rows in a part at least, for which keys are packed
constexpr size_t kTasksPerThread = 4;  // at a time
constexpr int64_t kRowBytes =
    int64_t{1} << 20;  // of queries, their gradients and dO at a time, or a block of each head
constexpr int64_t kScratchBytes = int64_t{4} << 30;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(kKeys % kPanelKeys == 0 && kKeys % kTileRows == 0 && kTileRows % 2 == 0);

// Queries [first, last) of a sequence, whole blocks but the last, and the key blocks that they see.
struct Part {
    int64_t first, last;
    int64_t first_block, last_block;
    int64_t blocks_before = 0;  // key blocks of the parts before it

    int64_t blocks() const { return last_block - first_block; }
};

Part keys_seen(const AttentionParams& f, int64_t b, int64_t first, int64_t last) {
    int64_t low, high, unused;  // no row of them sees keys before the first's low, nor from the last's high on
    visible_keys(f, b, first, &low, &unused);
    visible_keys(f, b, last - 1, &unused, &high);
    const int64_t keys = f.key_length[b];  // what a row beyond the last key sees is empty, and lies there
    return {first, last, std::min(low, keys) / kKeys, (std::min(high, keys) + kKeys - 1) / kKeys};
}

int64_t blocks_of(const std::vector<Part>& parts) {
    return parts.empty() ? 0 : parts.back().blocks_before + parts.back().blocks();
}

// The queries of a sequence in `count` parts or fewer, of about equal shares of the scores that are visible; `scores`
// are those up to the end of each block of rows.
std::vector<Part> cut(const AttentionParams& f, int64_t b, const std::vector<int64_t>& scores, int64_t count) {
    const int64_t blocks = static_cast<int64_t>(scores.size()), tokens = query_count(f, b);
    std::vector<Part> parts;
    int64_t block = 0;
    for (int64_t i = 1; i <= count && block < blocks; ++i) {
        const int64_t first = block * kRows;
        const double share = static_cast<double>(scores.back()) * i / count;
        do ++block;
        while (block < blocks && (i == count || static_cast<double>(scores[block - 1]) < share));
        Part part = keys_seen(f, b, first, std::min(block * kRows, tokens));
        part.blocks_before = blocks_of(parts);
        parts.push_back(part);
    }
    return parts;
}

// Of one sequence, whatever shares its batch: how often its sums are cut must not depend on that.
std::vector<Part> split_queries(const AttentionParams& f, int64_t b) {
    const int64_t group = f.query_heads / f.key_heads, tokens = query_count(f, b);
    const int64_t block_bytes = 2 * kKeys * ValuePanels(f.head_dim).columns() * static_cast<int64_t>(sizeof(float));
    std::vector<int64_t> scores;
    int64_t sum = 0, low, high;
    for (int64_t i = 0; i < tokens; ++i) {
        visible_keys(f, b, i, &low, &high);
        sum += high - low + 1;
        if ((i + 1) % kRows == 0 || i + 1 == tokens) scores.push_back(sum);
    }
    const int64_t most = static_cast<int64_t>(scores.size()) * group / kLeastBlocks;
    std::vector<Part> parts = cut(f, b, scores, 1);
    // Powers of two, which divide evenly among most numbers of threads.
    for (int64_t count = 1; count * f.key_heads < kTasks && 2 * count <= most; count *= 2) {
        std::vector<Part> more = cut(f, b, scores, 2 * count);
        if (blocks_of(more) * block_bytes > kScratchBytes) break;
        parts = std::move(more);
    }
    return parts;
}

// The gradients of a key head of a sequence, as its parts leave them.
struct KeyGradients {
    int64_t b, key_head, key_blocks, columns;
    const std::vector<Part>* parts;
    float* sums;       // by part: [2: keys, values][the key blocks that it sees][kKeys][columns]
    double* inv_freq;  // [parts + key_blocks][pairs]: what adds up to the frequencies' gradient; or null

    float* block(int64_t index, bool is_value, int64_t key_block) const {
        const Part& part = (*parts)[index];
        const int64_t at = 2 * part.blocks_before + is_value * part.blocks() + key_block - part.first_block;
        return sums + at * kKeys * columns;
    }
};

template <class T, class Math>
struct Task {
    using E = typename Math::Element;
    using Row = std::conditional_t<Math::kStep == 2, BFloat16, float>;  // one of a step's elements
    using Columns = Packed<Row, Math, kRows>;
    static constexpr int kRowSteps = kRows / Math::kStep;

    const AttentionBackwardParams& p;
    const AttentionParams& f;
    const Packed<T, Math, kKeys> packed;
    const Columns packed_rows;
    const int64_t row_blocks;  // that there is room for
    Pieces pieces;
    E *query, *grad;                            // [row_blocks][kRows][key_steps]
    E *query_columns, *grad_columns;            // a block of rows, by steps of rows
    E *keys, *values_as_keys, *keys_as_values;  // a block, packed
    E *probability, *slope, *slope_rows;        // [kRowSteps][kKeys] of P and dS; [kRows][kKeys] of dS
    float *scores, *grads;                      // [kTileRows][kKeys]
    float* grad_query;                          // [row_blocks][kRows][columns]
    float* angles;                              // [2][pairs]
    T* rows;                                    // [kKeys][head_dim]
    float *lse, *delta;                         // by query row: lse and D
    int64_t *low, *high;                        // visible keys by query row
    std::vector<bool> reached;                  // by strip of keys: whether its gradients hold a sum yet

    Task(const AttentionBackwardParams& params, int64_t blocks)
        : p(params), f(params.forward), packed(f.head_dim), packed_rows(f.head_dim), row_blocks(blocks) {
        const int64_t all_rows = row_blocks * kRows;
        pieces.allocate_for([&](Pieces& from) {
            from.take(&keys, packed.key_elements);
            from.take(&values_as_keys, packed.key_elements);
            from.take(&keys_as_values, packed.value_elements);
            from.take(&query_columns, packed_rows.value_elements);
            from.take(&grad_columns, packed_rows.value_elements);
            from.take(&probability, kRowSteps * kKeys);
            from.take(&slope, kRowSteps * kKeys);
            from.take(&slope_rows, kRows * kKeys / Math::kStep);
            from.take(&scores, kTileRows * kKeys);
            from.take(&grads, kTileRows * kKeys);
            from.take(&angles, 2 * f.rotation.pairs);
            from.take(&rows, kKeys * f.head_dim);
            from.take(&query, all_rows * packed.key_steps);
            from.take(&grad, all_rows * packed.key_steps);
            from.take(&grad_query, all_rows * packed.panels.columns());
            from.take(&lse, all_rows);
            from.take(&delta, all_rows);
            from.take(&low, all_rows);
            from.take(&high, all_rows);
        });
    }

    void angles_at(int64_t b, int64_t position) {
        rotation_row(f.rotation, b, position, angles, angles + f.rotation.pairs);
    }

    void rotate(const T* from, T* to) {
        rotate_row(from, f.head_dim, f.rotation.pairs, f.rotation.interleaved, angles, angles + f.rotation.pairs, to);
    }

    void to_steps(const T* row, E* to) const {
        for (int64_t step = 0; step < packed.key_steps; ++step)
            to[step] = Packed<T, Math, kKeys>::join(row, step, f.head_dim);
    }

    // Rows of query head `head` from query `first` on, into block `at`.
    void pack_queries(int64_t b, int64_t head, int64_t first, int64_t last, int64_t at) {
        const int64_t d = f.head_dim;
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = first + r, local = at * kRows + r;
            E* query_row_at = query + local * packed.key_steps;
            E* grad_row_at = grad + local * packed.key_steps;
            low[local] = high[local] = 0;
            lse[local] = kInfinity;
            delta[local] = 0.0f;
            std::memset(query_row_at, 0, sizeof(E) * packed.key_steps);
            std::memset(grad_row_at, 0, sizeof(E) * packed.key_steps);
            if (i >= last) continue;
            visible_keys(f, b, i, &low[local], &high[local]);
            if (high[local] <= low[local]) continue;
            const int64_t row = query_row(f, b, i), sum_at = lse_index(f, b, head, i);
            angles_at(b, query_position(f, b, i));
            rotate(row_of<T>(f.query, b, head, row), rows);
            to_steps(rows, query_row_at);
            float grad_lse = 0.0f;  // of a row whose scores are all -inf
            if (f.lse[sum_at] != -kInfinity) lse[local] = f.lse[sum_at], grad_lse = p.grad_lse[sum_at];
            const T* out = row_of<T>(f.out, b, head, row);
            const T* gradient = row_of<T>(p.grad_out, b, head, row);
            double sum = 0.0;  // D is taken from every dP of the row: what it loses, all of them lose
            for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(widen(gradient[c])) * widen(out[c]);
            delta[local] = static_cast<float>(sum - grad_lse);
            to_steps(gradient, grad_row_at);
        }
    }

    void pack_keys(int64_t b, int64_t key_head, int64_t first, int count) {
        const int64_t d = f.head_dim, slot = f.key_start[b] + first;
        for (int k = 0; k < count; ++k) {
            angles_at(b, key_position(f, b, first + k));
            rotate(row_of<T>(f.key, b, key_head, slot + k), rows + k * d);
        }
        std::memset(static_cast<void*>(rows + count * d), 0, sizeof(T) * (kKeys - count) * d);
        packed.pack_keys(rows, d, keys);
        packed.pack_values(rows, d, count, d, keys_as_values);
        for (int k = 0; k < count; ++k)
            std::memcpy(static_cast<void*>(rows + k * d), row_of<T>(f.value, b, key_head, slot + k), sizeof(T) * d);
        packed.pack_keys(rows, d, values_as_keys);
    }

    static vf exponential(vf x) {
#if defined(__AVX512BF16__)
        if constexpr (Math::kStep == 2) return exp2_for_bf16(x);
#endif
        return exp2v(x);
    }

    // P and dS of a strip of rows and keys [begin, end), in every layout that the products over them read. A strip of
    // keys that lies there in part finds zeros in the rest.
    void strip_gradients(int64_t block_row, int strip, int64_t first_key, int begin, int end) {
        constexpr int kMargin = (kTileRows + kLanes - 1) / kLanes * kLanes;
        const vi lane = iota();
        const float factor = f.softcap > 0.0f ? f.softcap : f.scale;
        for (int r = 0; r < kTileRows; r += Math::kStep) {
            const int at = (strip * kTileRows + r) / Math::kStep * kKeys;
            const vf none[2] = {splat(0.0f), splat(0.0f)};
            for (const int from : {begin - kMargin, end})
                for (int c = from; c < from + kMargin; c += kLanes)
                    if (c >= 0 && c < kKeys) {
                        put(none, probability + at + c);
                        put(none, slope + at + c);
                    }
            for (int c = begin; c < end; c += kLanes) {
                vf probabilities[Math::kStep], slopes[Math::kStep];
                for (int s = 0; s < Math::kStep; ++s) {
                    const int64_t row = block_row + strip * kTileRows + r + s;
                    vf x = load<vf>(scores + (r + s) * kKeys + c);
                    vf by = splat(f.scale);
                    if (f.softcap > 0.0f) {
                        x = tanhv(x * (f.scale / f.softcap));
                        by *= 1.0f - x * x;
                    }
                    vf weight = exponential((x * factor - lse[row]) * kLog2E);  // lse in base 2 is rounded once more
                    const int64_t from = low[row] - first_key, to = high[row] - first_key;
                    if (c < from || c + kLanes > to) {
                        const vi column = lane + c;
                        const int32_t least = static_cast<int32_t>(std::clamp<int64_t>(from, 0, kKeys));
                        const int32_t most = static_cast<int32_t>(std::clamp<int64_t>(to, 0, kKeys));
                        weight = (column >= least) & (column < most) ? weight : splat(0.0f);
                    }
                    probabilities[s] = weight;
                    slopes[s] = weight * (load<vf>(grads + (r + s) * kKeys + c) - delta[row]) * by;
                }
                put(probabilities, probability + at + c);
                put(slopes, slope + at + c, slope_rows + ((strip * kTileRows + r) * kKeys + c) / Math::kStep);
            }
        }
    }

    // The rows of a step side by side, lane by lane, and, where `rows_to` is given, each row on its own.
    static void put(const vf* rows_of_step, E* to, E* rows_to = nullptr) {
        if constexpr (Math::kStep == 1) {
            store(to, rows_of_step[0]);
            if (rows_to) store(rows_to, rows_of_step[0]);
        } else {
#if defined(__AVX512BF16__)
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(rows_of_step[1], rows_of_step[0]);
            const __m512i places = _mm512_or_si512((__m512i)iota(), _mm512_slli_epi32((__m512i)(iota() + kLanes), 16));
            store(to, _mm512_permutexvar_epi16(places, both));
            if (rows_to) {
                store(rows_to, _mm512_castsi512_si256(both));
                store(rows_to + kKeys / Math::kStep, _mm512_extracti64x4_epi64(both, 1));
            }
#endif
        }
    }

    // Asks for what the next block of rows will read and add to: one strip's worth of it.
    void prefetch_strip(int64_t row) const {
        const int64_t steps = kTileRows * packed.key_steps, columns = kTileRows * packed.panels.columns();
        const int64_t strip = row / kTileRows;
        prefetch_row(query + strip * steps, 0, steps * sizeof(E));
        prefetch_row(grad + strip * steps, 0, steps * sizeof(E));
        prefetch_row(grad_query + strip * columns, 0, columns * sizeof(float));
    }

    // One block of rows against one block of keys, whose gradients are asked for if it is the first. Returns whether
    // any of the rows sees any of the keys.
    bool block(int64_t row_block, int64_t key_block, float* key_gradient, float* value_gradient, bool is_first) {
        const int64_t first_row = row_block * kRows, first_key = key_block * kKeys;
        const int64_t columns = packed.panels.columns();
        int begins[kStrips], ends[kStrips];  // keys of the block that a strip of rows computes, whole panels
        bool any = false;
        for (int strip = 0; strip < kStrips; ++strip) {
            int64_t least = kKeys, most = 0;
            for (int64_t i = first_row + strip * kTileRows; i < first_row + (strip + 1) * kTileRows; ++i)
                if (high[i] > low[i]) {
                    least = std::min(least, low[i] - first_key);
                    most = std::max(most, high[i] - first_key);
                }
            const bool seen = most > 0 && least < kKeys;
            begins[strip] = seen ? static_cast<int>(std::max<int64_t>(least, 0)) / kPanelKeys * kPanelKeys : 0;
            ends[strip] =
                seen ? (static_cast<int>(std::min<int64_t>(most, kKeys)) + kPanelKeys - 1) / kPanelKeys * kPanelKeys
                     : 0;
            any = any || seen;
        }
        if (!any) return false;

        const auto* query_rows = reinterpret_cast<const Row*>(query + first_row * packed.key_steps);
        const auto* grad_rows = reinterpret_cast<const Row*>(grad + first_row * packed.key_steps);
        const int64_t stride = packed.key_steps * Math::kStep;
        packed_rows.pack_values(query_rows, stride, kRows, f.head_dim, query_columns);
        packed_rows.pack_values(grad_rows, stride, kRows, f.head_dim, grad_columns);

        const int64_t sums_bytes = kKeys * columns * static_cast<int64_t>(sizeof(float));
        const int steps = static_cast<int>(packed.key_steps);
        for (int strip = 0; strip < kStrips; ++strip) {
            const int64_t row = first_row + strip * kTileRows;
            if (row_block + 1 < row_blocks) prefetch_strip(row + kRows);
            if (is_first)
                for (const float* sums : {key_gradient, value_gradient})
                    prefetch_row(sums, strip * sums_bytes / kStrips, (strip + 1) * sums_bytes / kStrips);
            const int begin = begins[strip], end = ends[strip];
            if (begin == end) continue;
            for (int c = begin; c < end; c += kPanelKeys) {
                tile<Math, kTileVectors>(query + row * packed.key_steps, packed.key_steps, 1,
                                         keys + c * packed.key_steps, steps, scores + c, kKeys, nullptr);
                tile<Math, kTileVectors>(grad + row * packed.key_steps, packed.key_steps, 1,
                                         values_as_keys + c * packed.key_steps, steps, grads + c, kKeys, nullptr);
            }
            strip_gradients(first_row, strip, first_key, begin, end);
            const E* slopes = slope_rows + (strip * kTileRows * kKeys + begin) / Math::kStep;
            for (int panel = 0; panel < packed.panels.panels; ++panel) {
                const int first = packed.panels.first(panel) * kLanes, width = packed.panels.width(panel);
                tile_of<Math>(
                    width, slopes, kKeys / Math::kStep, 1,
                    keys_as_values + packed.value_steps * first + int64_t{begin / Math::kStep} * width * kLanes,
                    (end - begin) / Math::kStep, grad_query + row * columns + first, columns, kOnes);
            }
        }
        // The rows that have computed a strip of keys: an interval of their strips, since what a row sees begins and
        // ends no earlier than for the row before.
        int firsts[kKeyStrips], lasts[kKeyStrips];
        for (int strip = 0; strip < kKeyStrips; ++strip) {
            const int key = strip * kTileRows;
            const auto computes = [&](int rows_) { return begins[rows_] < key + kTileRows && ends[rows_] > key; };
            int first = 0, last = kStrips;
            while (first < last && !computes(first)) ++first;
            while (first < last && !computes(last - 1)) --last;
            firsts[strip] = first, lasts[strip] = last;
        }
        const int64_t strips = key_block * kKeyStrips;
        add_key_gradients(probability, grad_columns, firsts, lasts, strips, value_gradient);
        add_key_gradients(slope, query_columns, firsts, lasts, strips, key_gradient);
        for (int strip = 0; strip < kKeyStrips; ++strip)
            if (firsts[strip] < lasts[strip]) reached[strips + strip] = true;
        return true;
    }

    // sums[key] += the sum over the rows that have computed the key of weights[row][key] * operand[row]. Panel by
    // panel, which stays in L1.
    void add_key_gradients(const E* weights, const E* operand, const int* firsts, const int* lasts, int64_t strips,
                           float* sums) const {
        constexpr int kSteps = kTileRows / Math::kStep;  // of a strip of rows
        const int64_t columns = packed.panels.columns();
        for (int panel = 0; panel < packed.panels.panels; ++panel) {
            const int column = packed.panels.first(panel) * kLanes, width = packed.panels.width(panel);
            for (int strip = 0; strip < kKeyStrips; ++strip) {
                const int first = firsts[strip], last = lasts[strip], key = strip * kTileRows;
                if (first == last) continue;
                tile_of<Math>(width, weights + first * kSteps * kKeys + key, 1, kKeys,
                              operand + packed_rows.value_steps * column + int64_t{first} * kSteps * width * kLanes,
                              (last - first) * kSteps, sums + key * columns + column, columns,
                              reached[strips + strip] ? kOnes : nullptr);
            }
        }
    }

    static constexpr float kOnes[kTileRows] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};

    // dQ of a part, and its share of dK and dV.
    void attend(const KeyGradients& gradients, int64_t index) {
        const Part& part = (*gradients.parts)[index];
        const int64_t group = f.query_heads / f.key_heads;
        const int64_t columns = packed.panels.columns();
        reached.assign(gradients.key_blocks * kKeyStrips, false);
        const int64_t rows_at_once = row_blocks / group * kRows;
        for (int64_t first = part.first; first < part.last; first += rows_at_once)
            attend_rows(gradients, index, first, std::min(first + rows_at_once, part.last));
        for (int64_t key_block = part.first_block; key_block < part.last_block; ++key_block)
            for (int strip = 0; strip < kKeyStrips; ++strip)
                if (!reached[key_block * kKeyStrips + strip])
                    for (const bool is_value : {false, true})
                        std::memset(gradients.block(index, is_value, key_block) + strip * kTileRows * columns, 0,
                                    sizeof(float) * kTileRows * columns);
    }

    // Queries [first, last) of all heads of the group.
    void attend_rows(const KeyGradients& gradients, int64_t index, int64_t first, int64_t last) {
        const int64_t b = gradients.b, d = f.head_dim, columns = packed.panels.columns();
        const int64_t group = f.query_heads / f.key_heads, first_head = gradients.key_head * group;
        const int64_t blocks = (last - first + kRows - 1) / kRows;  // of each head
        for (int64_t i = 0; i < group * blocks; ++i)
            pack_queries(b, first_head + i / blocks, first + i % blocks * kRows, last, i);
        std::memset(grad_query, 0, sizeof(float) * group * blocks * kRows * columns);
        const Part seen = keys_seen(f, b, first, last);
        for (int64_t key_block = seen.first_block; key_block < seen.last_block; ++key_block) {
            pack_keys(b, gradients.key_head, key_block * kKeys,
                      static_cast<int>(std::min<int64_t>(kKeys, f.key_length[b] - key_block * kKeys)));
            float* key_gradient = gradients.block(index, false, key_block);
            float* value_gradient = gradients.block(index, true, key_block);
            bool is_first = true;
            for (int64_t i = 0; i < group * blocks; ++i)
                if (block(i, key_block, key_gradient, value_gradient, is_first)) is_first = false;
        }
        double* inv_freq = gradients.inv_freq ? gradients.inv_freq + index * f.rotation.pairs : nullptr;
        for (int64_t head = 0; head < group; ++head)
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = query_row(f, b, i), local = head * blocks * kRows + i - first;
                finish_row(b, query_position(f, b, i), row_of<T>(f.query, b, first_head + head, row),
                           grad_query + local * columns,
                           const_cast<T*>(row_of<T>(p.grad_query, b, first_head + head, row)), inv_freq, d);
            }
    }

    // Adds a row's part of the frequencies' gradient, rotates the row's gradient back and rounds it.
    void finish_row(int64_t b, int64_t position, const T* row, const float* gradient, T* to, double* inv_freq,
                    int64_t d) {
        const int pairs = f.rotation.pairs;
        float* cosines = angles;
        float* sines = cosines + pairs;
        angles_at(b, position);
        const bool is_rotated = position >= f.rotation.start_tokens[f.rotation.regime_index[b]];
        if (inv_freq != nullptr && is_rotated) {
            rotate(row, rows);
            for (int i = 0; i < pairs; ++i) {
                const int64_t x = f.rotation.interleaved ? 2 * i : i, y = f.rotation.interleaved ? x + 1 : i + pairs;
                inv_freq[i] += static_cast<double>(position) * (static_cast<double>(widen(rows[x])) * gradient[y] -
                                                                static_cast<double>(widen(rows[y])) * gradient[x]);
            }
        }
        for (int i = 0; i < pairs; ++i) sines[i] = -sines[i];
        for (int i = 0; i < pairs; ++i) {
            const int64_t x = f.rotation.interleaved ? 2 * i : i, y = f.rotation.interleaved ? x + 1 : i + pairs;
            narrow(gradient[x] * cosines[i] - gradient[y] * sines[i], to + x);
            narrow(gradient[y] * cosines[i] + gradient[x] * sines[i], to + y);
        }
        for (int64_t c = 2 * pairs; c < d; ++c) narrow(gradient[c], to + c);
    }

    // Sums a block of keys over the parts of the queries, in their order, and writes it.
    void finish_keys(const KeyGradients& gradients, int64_t key_block) {
        const int64_t b = gradients.b, d = f.head_dim, first = key_block * kKeys, columns = gradients.columns;
        const int64_t parts = static_cast<int64_t>(gradients.parts->size());
        const int count = static_cast<int>(std::min<int64_t>(kKeys, f.key_length[b] - first));
        double* inv_freq = gradients.inv_freq ? gradients.inv_freq + (parts + key_block) * f.rotation.pairs : nullptr;
        std::vector<float> sum(d);
        for (int k = 0; k < count; ++k) {
            const int64_t slot = f.key_start[b] + first + k;
            for (const bool is_value : {true, false}) {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (int64_t part = 0; part < parts; ++part) {
                    const Part& seen = (*gradients.parts)[part];
                    if (key_block < seen.first_block || key_block >= seen.last_block) continue;
                    const float* from = gradients.block(part, is_value, key_block) + k * columns;
                    float* to = sum.data();
                    for (int64_t c = 0; c < d; ++c) to[c] += from[c];
                }
                if (is_value) {
                    T* to = const_cast<T*>(row_of<T>(p.grad_value, b, gradients.key_head, slot));
                    for (int64_t c = 0; c < d; ++c) narrow(sum[c], to + c);
                } else {
                    finish_row(b, key_position(f, b, first + k), row_of<T>(f.key, b, gradients.key_head, slot),
                               sum.data(), const_cast<T*>(row_of<T>(p.grad_key, b, gradients.key_head, slot)), inv_freq,
                               d);
                }
            }
        }
    }
};

template <class T, class Math>
void attention_backward(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    if (f.batch == 0 || f.query_heads == 0) return;
    const int64_t group = f.query_heads / f.key_heads, pairs = f.rotation.pairs;
    const int64_t columns = ValuePanels(f.head_dim).columns();
    std::vector<std::vector<Part>> parts(f.batch);
    int64_t row_blocks = 0;  // of one head of the largest part
    std::vector<KeyGradients> heads;
    for (int64_t b = 0; b < f.batch; ++b) {
        parts[b] = split_queries(f, b);
        for (const Part& part : parts[b])
            row_blocks = std::max(row_blocks, (part.last - part.first + kRows - 1) / kRows);
        for (int64_t head = 0; head < f.key_heads; ++head)
            heads.push_back({b, head, (f.key_length[b] + kKeys - 1) / kKeys, columns, &parts[b], nullptr, nullptr});
    }
    const int64_t row_bytes =
        columns * static_cast<int64_t>(2 * sizeof(typename Math::Element) / Math::kStep + sizeof(float));
    row_blocks = group * std::min(row_blocks, std::max<int64_t>(kRowBytes / (group * kRows * row_bytes), 1));
    const auto sum_elements = [](const KeyGradients& head) {
        return 2 * blocks_of(*head.parts) * kKeys * head.columns;
    };
    const auto frequency_elements = [&](const KeyGradients& head) {
        return (static_cast<int64_t>(head.parts->size()) + head.key_blocks) * pairs;
    };

    // Key heads go through the scratch in runs: enough for all threads, since memory that is used again costs no
    // faults, and no more than fit it.
    constexpr int64_t kFit = kScratchBytes / static_cast<int64_t>(sizeof(float));
    const size_t enough = kTasksPerThread * static_cast<size_t>(f.threads);
    std::vector<size_t> runs{0};
    int64_t room = 0;
    for (size_t first = 0; first < heads.size();) {
        size_t last = first;
        int64_t elements = 0;
        size_t tasks = 0;
        do {
            tasks += heads[last].parts->size();
            elements += sum_elements(heads[last++]);
        } while (last < heads.size() && tasks < enough && elements + sum_elements(heads[last]) <= kFit);
        room = std::max(room, elements);
        runs.push_back(first = last);
    }
    const Buffer<float> scratch = allocate<float>(room);

    for (size_t run = 0; run + 1 < runs.size(); ++run) {
        struct Piece {
            KeyGradients* head;
            int64_t index;  // of the part, or of the block of keys
        };
        std::vector<Piece> attends, finishes;
        std::vector<double> frequency;
        int64_t sums = 0, frequencies = 0;
        for (size_t i = runs[run]; i < runs[run + 1]; ++i) frequencies += frequency_elements(heads[i]);
        if (p.grad_inv_freq) frequency.resize(frequencies);
        frequencies = 0;
        for (size_t i = runs[run]; i < runs[run + 1]; ++i) {
            KeyGradients& head = heads[i];
            head.sums = scratch.get() + sums;
            head.inv_freq = p.grad_inv_freq ? frequency.data() + frequencies : nullptr;
            sums += sum_elements(head);
            frequencies += frequency_elements(head);
            for (size_t part = 0; part < head.parts->size(); ++part)
                attends.push_back({&head, static_cast<int64_t>(part)});
            for (int64_t block = 0; block < head.key_blocks; ++block) finishes.push_back({&head, block});
        }
        std::atomic<size_t> next{0};
        run_workers(f.threads, [&](int) {
            Task<T, Math> task(p, row_blocks);
            for (size_t i; (i = next.fetch_add(1)) < attends.size();) task.attend(*attends[i].head, attends[i].index);
        });
        next = 0;
        run_workers(f.threads, [&](int) {
            Task<T, Math> task(p, 0);
            for (size_t i; (i = next.fetch_add(1)) < finishes.size();)
                task.finish_keys(*finishes[i].head, finishes[i].index);
        });
        if (p.grad_inv_freq)
            for (size_t i = runs[run]; i < runs[run + 1]; ++i)
                for (int64_t at = 0; at < frequency_elements(heads[i]); ++at)
                    p.grad_inv_freq[heads[i].b * pairs + at % pairs] += heads[i].inv_freq[at];
    }
}

}  // namespace

void LONGROPE_LEVEL(attention_backward)(const AttentionBackwardParams& p) {
    switch (p.forward.dtype) {
        case Dtype::kFloat32:
            return attention_backward<float, Fp32Math>(p);
        case Dtype::kFloat16:
            return attention_backward<_Float16, Fp32Math>(p);
#if defined(__AVX512BF16__)
        case Dtype::kBFloat16:
            return attention_backward<BFloat16, Bf16Math>(p);
#else
        case Dtype::kBFloat16:
            return attention_backward<BFloat16, Fp32Math>(p);
#endif
    }
}

}  // namespace longrope
