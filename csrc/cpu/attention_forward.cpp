// Attention forward with rotation fused in, for one instruction set.
//
//   1. pack     each key block (256 keys, counted from the sequence's first) is rotated once, with one cos and sin per
//               position for all heads, rounded to the operand's dtype, and laid out for the products
//   2. attend   a task is 96 rows of one (sequence, key head); rows run over queries and the query heads that share the
//               key head. Each strip of 6 rows walks its visible key blocks: scores in a 6 x 4-vector register tile,
//               softmax on the strip in L1, then the product with the values into the strip's fp32 output
//
// Operations: 4 head_dim per visible score in the products, about 15 in the softmax. Bytes: packed keys and values stay
// in L2 while 16 strips use them. Bound by the multiply-add units: bf16 pairs (vdpbf16ps) where the instruction set has
// them, fp32 otherwise; fp16 is widened to fp32 when packed.
//
// A row of finite operands depends on its own interval of keys alone: block boundaries are multiples of 256 in the
// key's index, and what a strip computes outside a row's interval is multiplied by an exact zero (which an infinite
// value survives: a NaN or infinity in a value may reach rows of its strip that do not see it, as in any blockwise
// attention).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_decode.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "tile.h"

namespace longrope {
namespace {

constexpr int kKeyBlock = 256;
constexpr int kRowBlock = 16 * kTileRows;
constexpr int64_t kScratchBytes = int64_t{256} << 20;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one worker needs to pack: cos and sin of a block's positions, and its rows of one head.
template <class T>
struct PackWorkspace {
    Buffer<T> rows;                // [kKeyBlock][head_dim]
    Buffer<float> cosines, sines;  // [kKeyBlock][pairs]
    Buffer<float> wide;            // [head_dim]

    explicit PackWorkspace(const AttentionParams& p)
        : rows(allocate<T>(kKeyBlock * p.head_dim)),
          cosines(allocate<float>(int64_t{kKeyBlock} * p.rotation.pairs)),
          sines(allocate<float>(int64_t{kKeyBlock} * p.rotation.pairs)),
          wide(allocate<float>(p.head_dim)) {}
};

// Rotates and packs block `block` of sequence b for every key head; `blocks` is where its packed blocks lie, one run of
// `head_elements` per head.
template <class T, class Math>
void pack_block(const AttentionParams& p, const Packed<T, Math, kKeyBlock>& packed, int64_t b, int64_t block,
                int64_t first_head, int64_t heads, typename Math::Element* to, int64_t head_elements,
                const PackWorkspace<T>& w) {
    const int64_t first = block * kKeyBlock;
    const int count = static_cast<int>(std::min<int64_t>(kKeyBlock, p.key_length[b] - first));
    const int pairs = p.rotation.pairs;
    for (int k = 0; k < count; ++k)
        rotation_row(p.rotation, b, key_position(p, b, first + k), w.cosines.get() + int64_t{k} * pairs,
                     w.sines.get() + int64_t{k} * pairs);
    T* rows = w.rows.get();
    for (int64_t head = 0; head < heads; ++head) {
        for (int k = 0; k < count; ++k)
            rotated_key(p, b, first_head + head, first + k, w.cosines.get() + int64_t{k} * pairs,
                        w.sines.get() + int64_t{k} * pairs, w.wide.get(), rows + k * p.head_dim);
        std::memset(static_cast<void*>(rows + count * p.head_dim), 0, sizeof(T) * (kKeyBlock - count) * p.head_dim);
        typename Math::Element* block_to = to + head * head_elements + block * packed.block_elements();
        packed.pack_keys(rows, p.head_dim, block_to);
        int64_t stride;
        const T* values = value_rows(p, b, first_head + head, first, count, rows, &stride);
        packed.pack_values(values, stride, count, p.head_dim, block_to + packed.key_elements);
    }
}

// What one worker needs to attend: one block of rows, and one strip's scores and probabilities.
template <class T, class Math>
struct Workspace {
    Buffer<typename Math::Element> query;     // [kRowBlock][key_steps], rotated
    Buffer<float> out;                        // [kRowBlock][columns]
    Buffer<float> scores;                     // [kTileRows][kKeyBlock]
    Buffer<float> probabilities;              // [kTileRows][kKeyBlock], as Math::Element
    Buffer<float> angles;                     // [2][pairs]
    Buffer<T> row;                            // [head_dim]
    float largest[kRowBlock];                 // running maximum of the scores
    float sums[kRowBlock][kLanes];            // running sum of probabilities, by lane
    int64_t low[kRowBlock], high[kRowBlock];  // visible keys, by index

    explicit Workspace(const AttentionParams& p, const Packed<T, Math, kKeyBlock>& packed)
        : query(allocate<typename Math::Element>(kRowBlock * packed.key_steps)),
          out(allocate<float>(kRowBlock * packed.panels.columns())),
          scores(allocate<float>(kTileRows * kKeyBlock)),
          probabilities(allocate<float>(kTileRows * kKeyBlock)),
          angles(allocate<float>(2 * p.rotation.pairs)),
          row(allocate<T>(p.head_dim)) {}
};

// What makes a log2 score of one that is stored; behind a softcap it already is.
inline float log2_multiplier(const AttentionParams& p) {
    return p.softcap > 0.0f ? 1.0f : p.scale * kLog2E;
}

// Scores of a strip become probabilities: mask, softcap, running maximum and sum. Returns in `scales` what the strip's
// output is to be multiplied by.
template <class T, class Math>
__attribute__((noinline)) void softmax_strip(const AttentionParams& p, Workspace<T, Math>& w, int first_row,
                                             int64_t first_key, int begin, int end, float* scales) {
    const vi lane = iota();
    const float multiplier = log2_multiplier(p), cap = p.softcap * kLog2E;
    float shifts[kTileRows];
    // All maxima first: the last steps of each wait for one another, and those of other rows fill the time.
    for (int r = 0; r < kTileRows; ++r) {
        const int row = first_row + r;
        float* scores = w.scores.get() + r * kKeyBlock;
        const int low = static_cast<int>(std::clamp<int64_t>(w.low[row] - first_key, begin, end));
        const int high = static_cast<int>(std::clamp<int64_t>(w.high[row] - first_key, begin, end));
        if (p.softcap > 0.0f)
            for (int c = begin; c < end; c += kLanes)
                store(scores + c, tanhv(load<vf>(scores + c) * (p.scale / p.softcap)) * cap);
        if (low > begin || high < end) {
            const vf masked = splat(-kInfinity);
            for (int c = begin; c < end; c += kLanes) {
                if (c >= low && c + kLanes <= high) continue;
                const vi column = lane + c;
                store(scores + c, (column >= low) & (column < high) ? load<vf>(scores + c) : masked);
            }
        }
        vf top = splat(-kInfinity);
        for (int c = begin; c < end; c += kLanes) top = vmax(top, load<vf>(scores + c));
        const float before = w.largest[row];
        const float now = std::max(before, reduce_max(top));
        w.largest[row] = now;
        shifts[r] = now == -kInfinity ? 0.0f : now;
        scales[r] = before == -kInfinity ? 0.0f : exp2v(splat((before - shifts[r]) * multiplier))[0];
    }
    for (int r = 0; r < kTileRows; ++r) {
        const float* scores = w.scores.get() + r * kKeyBlock;
        const float shift = shifts[r];
        vf sum = splat(0.0f);
        if constexpr (Math::kStep == 1) {
            float* to = w.probabilities.get() + r * kKeyBlock;
            for (int c = begin; c < end; c += kLanes) {
                const vf x = exp2v((load<vf>(scores + c) - shift) * multiplier);
                sum += x;
                store(to + c, x);
            }
        } else {
#if defined(__AVX512BF16__)
            uint16_t* to = reinterpret_cast<uint16_t*>(w.probabilities.get()) + r * kKeyBlock;
            const float offset = -shift * multiplier;
            for (int c = begin; c < end; c += 2 * kLanes) {
                const vf x = exp2_for_bf16(load<vf>(scores + c) * multiplier + offset);
                const vf y = exp2_for_bf16(load<vf>(scores + c + kLanes) * multiplier + offset);
                sum += x;
                sum += y;
                store(to + c, (__m512i)_mm512_cvtne2ps_pbh(y, x));
            }
#endif
        }
        float* sums = w.sums[first_row + r];
        store(sums, load<vf>(sums) * scales[r] + sum);
    }
}

template <class T, class Math>
void attend_rows(const AttentionParams& p, const Packed<T, Math, kKeyBlock>& packed, Workspace<T, Math>& w, int64_t b,
                 int64_t head, int64_t first_row, const typename Math::Element* blocks) {
    using Element = typename Math::Element;
    const int64_t group = p.query_heads / p.key_heads;
    const int64_t all_rows = group * query_count(p, b);
    if (first_row >= all_rows) return;
    const int rows = static_cast<int>(std::min<int64_t>(kRowBlock, all_rows - first_row));
    const int columns = packed.panels.columns();
    const int pairs = p.rotation.pairs;

    int64_t token = -1;
    for (int r = 0; r < kRowBlock; ++r) {
        w.low[r] = w.high[r] = 0;
        w.largest[r] = -kInfinity;
        store(w.sums[r], splat(0.0f));
        Element* query = w.query.get() + r * packed.key_steps;
        if (r >= rows) {
            std::memset(query, 0, sizeof(Element) * packed.key_steps);
            continue;
        }
        const int64_t i = (first_row + r) / group;
        visible_keys(p, b, i, &w.low[r], &w.high[r]);
        if (i != token) {
            rotation_row(p.rotation, b, query_position(p, b, i), w.angles.get(), w.angles.get() + pairs);
            token = i;
        }
        rotate_row(row_of<T>(p.query, b, head * group + (first_row + r) % group, query_row(p, b, i)), p.head_dim, pairs,
                   p.rotation.interleaved, w.angles.get(), w.angles.get() + pairs, w.row.get());
        for (int64_t step = 0; step < packed.key_steps; ++step)
            query[step] = Packed<T, Math, kKeyBlock>::join(w.row.get(), step, p.head_dim);
    }
    std::memset(w.out.get(), 0, sizeof(float) * kRowBlock * columns);

    const int strips = (rows + kTileRows - 1) / kTileRows;
    int64_t first_key = std::numeric_limits<int64_t>::max(), last_key = 0;
    for (int r = 0; r < rows; ++r)
        if (w.high[r] > w.low[r]) {
            first_key = std::min(first_key, w.low[r]);
            last_key = std::max(last_key, w.high[r]);
        }
    for (int64_t block = first_key / kKeyBlock; block * kKeyBlock < last_key; ++block) {
        const int64_t key = block * kKeyBlock;
        const Element* keys = blocks + block * packed.block_elements();
        const Element* values = keys + packed.key_elements;
        for (int strip = 0; strip < strips; ++strip) {
            const int row = strip * kTileRows;
            int64_t low = kKeyBlock, high = 0;
            for (int r = row; r < row + kTileRows; ++r)
                if (w.high[r] > w.low[r]) {
                    low = std::min(low, w.low[r] - key);
                    high = std::max(high, w.high[r] - key);
                }
            if (high <= 0 || low >= kKeyBlock) continue;
            const int begin = static_cast<int>(std::max<int64_t>(low, 0)) / kPanelKeys * kPanelKeys;
            const int end =
                std::min(kKeyBlock, (static_cast<int>(std::min<int64_t>(high, kKeyBlock)) + kPanelKeys - 1) /
                                        kPanelKeys * kPanelKeys);
            for (int c = begin; c < end; c += kPanelKeys)
                tile<Math, kTileVectors>(w.query.get() + row * packed.key_steps, packed.key_steps, 1,
                                         keys + c * packed.key_steps, static_cast<int>(packed.key_steps),
                                         w.scores.get() + c, kKeyBlock, nullptr);
            float scales[kTileRows];
            softmax_strip(p, w, row, key, begin, end, scales);
            const Element* probabilities =
                reinterpret_cast<const Element*>(w.probabilities.get()) + begin / Math::kStep;
            for (int panel = 0; panel < packed.panels.panels; ++panel) {
                const int first = packed.panels.first(panel) * kLanes, width = packed.panels.width(panel);
                tile_of<Math>(width, probabilities, kKeyBlock / Math::kStep, 1,
                              values + packed.value_steps * first + int64_t{begin / Math::kStep} * width * kLanes,
                              (end - begin) / Math::kStep, w.out.get() + row * columns + first, columns, scales);
            }
        }
    }

    const double natural = natural_units(p) * log2_multiplier(p);
    T* out = static_cast<T*>(p.out.data) + b * p.out.batch_stride;
    for (int r = 0; r < rows; ++r) {
        const int64_t i = (first_row + r) / group, query_head = head * group + (first_row + r) % group;
        T* to = out + query_head * p.out.head_stride + query_row(p, b, i) * p.out.token_stride;
        const float sum = reduce_add(load<vf>(w.sums[r]));
        const float inverse = 1.0f / sum;
        const float* from = w.out.get() + r * columns;
        const bool seen = sum != 0.0f;  // also where a score is not a number: then neither is the result
        for (int64_t d = 0; d < p.head_dim; ++d) narrow(seen ? from[d] * inverse : 0.0f, to + d);
        p.lse[lse_index(p, b, query_head, i)] =
            seen ? static_cast<float>(w.largest[r] * natural + std::log(static_cast<double>(sum))) : -kInfinity;
    }
}

// Attends for `sequences`, which have more rows than the decoder takes.
template <class T, class Math>
void prefill(const AttentionParams& p, const std::vector<int64_t>& sequences) {
    using Element = typename Math::Element;
    const Packed<T, Math, kKeyBlock> packed(p.head_dim);
    const int64_t group = p.query_heads / p.key_heads;
    int64_t row_blocks = 0, key_blocks = 1;
    for (int64_t b : sequences) {
        row_blocks = std::max(row_blocks, (group * query_count(p, b) + kRowBlock - 1) / kRowBlock);
        key_blocks = std::max(key_blocks, (p.key_length[b] + kKeyBlock - 1) / kKeyBlock);
    }
    const int64_t head_elements = key_blocks * packed.block_elements();

    // (sequence, key head) pairs go through the scratch in groups that fit it.
    const int64_t pairs = static_cast<int64_t>(sequences.size()) * p.key_heads;
    const int64_t fit =
        std::clamp<int64_t>(kScratchBytes / static_cast<int64_t>(head_elements * sizeof(Element)), 1, pairs);
    const Buffer<Element> scratch = allocate<Element>(fit * head_elements);
    for (int64_t done = 0; done < pairs; done += fit) {
        const int64_t count = std::min(fit, pairs - done);
        // Heads of one sequence share their angles, so a packing task is a block of one sequence.
        const int64_t first_sequence = done / p.key_heads, last_sequence = (done + count - 1) / p.key_heads;
        std::atomic<int64_t> next_pack{0}, next_task{0};
        run_workers(p.threads, [&](int) {
            const PackWorkspace<T> workspace(p);
            const int64_t tasks = (last_sequence - first_sequence + 1) * key_blocks;
            for (int64_t task; (task = next_pack.fetch_add(1)) < tasks;) {
                const int64_t s = first_sequence + task / key_blocks, block = task % key_blocks;
                if (block * kKeyBlock >= p.key_length[sequences[s]]) continue;
                const int64_t first = std::max(done - s * p.key_heads, int64_t{0});
                const int64_t last = std::min(done + count - s * p.key_heads, p.key_heads);
                pack_block(p, packed, sequences[s], block, first, last - first,
                           scratch.get() + (s * p.key_heads + first - done) * head_elements, head_elements, workspace);
            }
        });
        run_workers(p.threads, [&](int) {
            Workspace<T, Math> workspace(p, packed);
            const int64_t tasks = count * row_blocks;
            for (int64_t task; (task = next_task.fetch_add(1)) < tasks;) {
                // Last rows first: with a causal mask they see the most keys, and short tasks fill the end.
                const int64_t row_block = row_blocks - 1 - task / count, pair = task % count;
                attend_rows(p, packed, workspace, sequences[(done + pair) / p.key_heads], (done + pair) % p.key_heads,
                            row_block * kRowBlock, scratch.get() + pair * head_elements);
            }
        });
    }
}

template <class T, class Math>
void attention(const AttentionParams& p) {
    if (p.query_heads == 0) return;
    std::vector<int64_t> few, many;
    for (int64_t b = 0; b < p.batch; ++b)
        if (query_count(p, b) > 0) (decodes(p, b) ? few : many).push_back(b);
    if (!few.empty()) Decoder<T>(p, few).run();
    if (!many.empty()) prefill<T, Math>(p, many);
}

}  // namespace

void LONGROPE_LEVEL(attention_forward)(const AttentionParams& p) {
    switch (p.dtype) {
        case Dtype::kFloat32:
            return attention<float, Fp32Math>(p);
        case Dtype::kFloat16:
            return attention<_Float16, Fp32Math>(p);
#if defined(__AVX512BF16__)
        case Dtype::kBFloat16:
            return attention<BFloat16, Bf16Math>(p);
#else
        case Dtype::kBFloat16:
            return attention<BFloat16, Fp32Math>(p);
#endif
    }
}

}  // namespace longrope
