// Attention backward with rotation fused in, for one instruction set. Probabilities are recomputed from lse; nothing
// rotated is stored between the passes; dq and dk are rotated back as they are written.
//
//   1. heads    a task is one (sequence, query head). Its queries and output gradients are packed once; then key block
//   by
//               key block (128 keys) and query block by query block (96 rows):
//                   S = Q K^T, dP = dO V^T            row strips of 6 against panels of keys
//                   P = exp(S - lse), dS = P (dP - D) with D = rowsum(dO O) - dlse
//                   dV^T += dO^T P, dK^T += Q^T dS    strips of 6 head dims against panels of keys
//                   dQ += dS K                        row strips against panels of head dims
//   2. keys     dK and dV of the query heads that share a key head are added in the order of the heads, rotated back
//   and
//               rounded
//
// Transposing dK and dV makes the probabilities, which come out of the registers with keys across lanes, the panel
// operand of their products: nothing but what is multiplied is ever transposed, once a task, when queries are packed.
// Operations: 10 head_dim per visible score. Every sum has one order, whatever the number of threads: blocks ascend.
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

constexpr int kKeys = 128;             // keys in a block
constexpr int kRows = 16 * kTileRows;  // query rows in a block
constexpr int64_t kScratchBytes = int64_t{1} << 30;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(kKeys % kPanelKeys == 0 && kRows % 2 == 0);

// Queries (or output gradients) of a head: rows for the products over head dims, and for each block of kRows the
// transpose, [head dims rounded up to strips][kRows], for the products over rows.
template <class T, class Math>
struct PackedRows {
    int64_t steps, dims, blocks;
    Buffer<typename Math::Element> rows, columns;

    PackedRows(int64_t tokens, int64_t head_dim)
        : steps((head_dim + Math::kStep - 1) / Math::kStep),
          dims((head_dim + kTileRows - 1) / kTileRows * kTileRows),
          blocks((tokens + kRows - 1) / kRows),
          rows(allocate<typename Math::Element>(blocks * kRows * steps)),
          columns(allocate<typename Math::Element>(blocks * dims * (kRows / Math::kStep))) {}

    typename Math::Element* block_rows(int64_t block) const { return rows.get() + block * kRows * steps; }
    typename Math::Element* block_columns(int64_t block) const {
        return columns.get() + block * dims * (kRows / Math::kStep);
    }

    // `values`: kRows rows of head_dim elements, contiguous.
    void pack(int64_t block, const T* values, int64_t head_dim) const {
        for (int r = 0; r < kRows; ++r)
            for (int64_t step = 0; step < steps; ++step)
                block_rows(block)[r * steps + step] =
                    Packed<T, Math, kKeys>::join(values + r * head_dim, step, head_dim);
        typename Math::Element* to = block_columns(block);
        for (int64_t d = 0; d < dims; ++d)
            for (int r = 0; r < kRows / Math::kStep; ++r, ++to) {
                if (d >= head_dim) {
                    *to = 0;
                } else if constexpr (Math::kStep == 1) {
                    *to = widen(values[r * head_dim + d]);
                } else {
                    *to = values[2 * r * head_dim + d].bits |
                          static_cast<uint32_t>(values[(2 * r + 1) * head_dim + d].bits) << 16;
                }
            }
    }
};

// dK^T and dV^T of one query head, [blocks][dims][kKeys] each.
struct KeyGradients {
    int64_t block_elements;
    float *key, *value;
};

template <class T, class Math>
struct HeadTask {
    using E = typename Math::Element;
    const AttentionBackwardParams& p;
    const AttentionParams& f;
    const Packed<T, Math, kKeys> packed;
    PackedRows<T, Math> query, grad;
    Buffer<E> keys, values_as_keys, keys_as_values;   // a block, packed
    Buffer<E> probability, slope_panels, slope_rows;  // P and dS of a block: [row steps][kKeys] panels; dS rows
    Buffer<float> scores, grads;                      // [kTileRows][kKeys]
    Buffer<float> grad_query;                         // [tokens][columns]
    Buffer<float> angles;
    Buffer<T> rows;
    std::vector<float> lse, delta;   // by query row: lse and D
    std::vector<int64_t> low, high;  // visible keys by query row

    HeadTask(const AttentionBackwardParams& params, int64_t query_tokens)
        : p(params),
          f(params.forward),
          packed(f.head_dim),
          query(query_tokens, f.head_dim),
          grad(query_tokens, f.head_dim),
          keys(allocate<E>(packed.key_elements)),
          values_as_keys(allocate<E>(packed.key_elements)),
          keys_as_values(allocate<E>(packed.value_elements)),
          probability(allocate<E>(kRows / Math::kStep * kKeys)),
          slope_panels(allocate<E>(kRows / Math::kStep * kKeys)),
          slope_rows(allocate<E>(kRows * kKeys / Math::kStep)),
          scores(allocate<float>(kTileRows * kKeys)),
          grads(allocate<float>(kTileRows * kKeys)),
          grad_query(allocate<float>(query.blocks * kRows * packed.panels.columns())),
          angles(allocate<float>(2 * std::max(f.rotation.pairs, 1))),
          rows(allocate<T>(std::max(kRows, kKeys) * f.head_dim)),
          lse(query.blocks * kRows),
          delta(query.blocks * kRows),
          low(query.blocks * kRows),
          high(query.blocks * kRows) {}

    void rotate(int64_t b, int64_t position, const T* from, T* to) {
        rotation_row(f.rotation, b, position, angles.get(), angles.get() + f.rotation.pairs);
        rotate_row(from, f.head_dim, f.rotation.pairs, f.rotation.interleaved, angles.get(),
                   angles.get() + f.rotation.pairs, to);
    }

    void pack_queries(int64_t b, int64_t head, int64_t blocks) {
        const int64_t d = f.head_dim;
        const int64_t tokens = query_count(f, b);
        for (int64_t block = 0; block < blocks; ++block) {
            for (int r = 0; r < kRows; ++r) {
                const int64_t i = block * kRows + r;
                low[i] = high[i] = 0;
                lse[i] = kInfinity;
                delta[i] = 0.0f;
                if (i >= tokens) {
                    std::memset(static_cast<void*>(rows.get() + r * d), 0, sizeof(T) * d);
                    continue;
                }
                rotate(b, query_position(f, b, i), row_of<T>(f.query, b, head, query_row(f, b, i)), rows.get() + r * d);
                visible_keys(f, b, i, &low[i], &high[i]);
                const int64_t at = lse_index(f, b, head, i);
                if (f.lse[at] != -kInfinity) lse[i] = f.lse[at];
            }
            query.pack(block, rows.get(), d);
            for (int r = 0; r < kRows; ++r) {
                const int64_t i = block * kRows + r;
                T* to = rows.get() + r * d;
                if (i >= tokens || high[i] <= low[i]) {
                    std::memset(static_cast<void*>(to), 0, sizeof(T) * d);
                    continue;
                }
                const int64_t row = query_row(f, b, i);
                const T* out = row_of<T>(f.out, b, head, row);
                std::memcpy(static_cast<void*>(to), row_of<T>(p.grad_out, b, head, row), sizeof(T) * d);
                float sum = 0.0f;
                for (int64_t c = 0; c < d; ++c) sum += widen(to[c]) * widen(out[c]);
                delta[i] = sum - p.grad_lse[lse_index(f, b, head, i)];
            }
            grad.pack(block, rows.get(), d);
        }
    }

    void pack_keys(int64_t b, int64_t key_head, int64_t first, int count) {
        const int64_t d = f.head_dim, slot = f.key_start[b] + first;
        for (int k = 0; k < count; ++k)
            rotate(b, key_position(f, b, first + k), row_of<T>(f.key, b, key_head, slot + k), rows.get() + k * d);
        std::memset(static_cast<void*>(rows.get() + count * d), 0, sizeof(T) * (kKeys - count) * d);
        packed.pack_keys(rows.get(), d, keys.get());
        packed.pack_values(rows.get(), d, count, d, keys_as_values.get());
        for (int k = 0; k < count; ++k)
            std::memcpy(static_cast<void*>(rows.get() + k * d), row_of<T>(f.value, b, key_head, slot + k),
                        sizeof(T) * d);
        packed.pack_keys(rows.get(), d, values_as_keys.get());
    }

    static vf exponential(vf x) {
#if defined(__AVX512BF16__)
        if constexpr (Math::kStep == 2) return exp2_for_bf16(x);
#endif
        return exp2v(x);
    }

    // P and dS of a strip of rows, into the panels and rows that the three products over them read.
    void strip_gradients(int64_t first_row, int strip, int64_t first_key, int begin, int end) {
        const vi lane = iota();
        const float factor = f.softcap > 0.0f ? f.softcap : f.scale;
        const int64_t panel_stride = int64_t{kRows / Math::kStep} * kPanelKeys;
        for (int r = 0; r < kTileRows; r += Math::kStep) {
            for (int c = begin; c < end; c += kLanes) {
                vf probabilities[Math::kStep], slopes[Math::kStep];
                for (int s = 0; s < Math::kStep; ++s) {
                    const int64_t row = first_row + strip * kTileRows + r + s;
                    vf x = load<vf>(scores.get() + (r + s) * kKeys + c);
                    vf slope = splat(f.scale);
                    if (f.softcap > 0.0f) {
                        x = tanhv(x * (f.scale / f.softcap));
                        slope *= 1.0f - x * x;
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
                    slopes[s] = weight * (load<vf>(grads.get() + (r + s) * kKeys + c) - delta[row]) * slope;
                }
                const int64_t step = (strip * kTileRows + r) / Math::kStep;
                const int64_t at = c / kPanelKeys * panel_stride + step * kPanelKeys + c % kPanelKeys;
                put(probabilities, probability.get() + at);
                put(slopes, slope_panels.get() + at);
                for (int s = 0; s < Math::kStep; ++s) put_row(slopes[s], strip * kTileRows + r + s, c);
            }
        }
    }

    // Rows of a step side by side, lane by lane.
    static void put(const vf* rows_of_step, E* to) {
        if constexpr (Math::kStep == 1) {
            store(to, rows_of_step[0]);
        } else {
#if defined(__AVX512BF16__)
            const __m512i low_half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows_of_step[0]));
            const __m512i high_half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows_of_step[1]));
            _mm512_storeu_si512(to, _mm512_or_si512(low_half, _mm512_slli_epi32(high_half, 16)));
#endif
        }
    }

    void put_row(vf x, int row, int column) {
        if constexpr (Math::kStep == 1) {
            store(slope_rows.get() + row * kKeys + column, x);
        } else {
#if defined(__AVX512BF16__)
            uint16_t* to = reinterpret_cast<uint16_t*>(slope_rows.get()) + row * kKeys + column;
            store(to, (__m256i)_mm512_cvtneps_pbh(x));
#endif
        }
    }

    // One block of rows against one block of keys.
    void block(int64_t row_block, int64_t first_key, float* key_gradient, float* value_gradient) {
        const int64_t first_row = row_block * kRows, columns = packed.panels.columns();
        int64_t least = kKeys, most = 0;
        for (int64_t i = first_row; i < first_row + kRows; ++i)
            if (high[i] > low[i]) {
                least = std::min(least, low[i] - first_key);
                most = std::max(most, high[i] - first_key);
            }
        if (most <= 0 || least >= kKeys) return;
        const int begin = static_cast<int>(std::max<int64_t>(least, 0)) / kPanelKeys * kPanelKeys;
        const int end = (static_cast<int>(std::min<int64_t>(most, kKeys)) + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
        const int steps = static_cast<int>(packed.key_steps);
        for (int strip = 0; strip < kRows / kTileRows; ++strip) {
            const int64_t at = int64_t{strip} * kTileRows * packed.key_steps;
            for (int c = begin; c < end; c += kPanelKeys) {
                tile<Math, kTileVectors>(query.block_rows(row_block) + at, packed.key_steps,
                                         keys.get() + c * packed.key_steps, steps, scores.get() + c, kKeys, nullptr);
                tile<Math, kTileVectors>(grad.block_rows(row_block) + at, packed.key_steps,
                                         values_as_keys.get() + c * packed.key_steps, steps, grads.get() + c, kKeys,
                                         nullptr);
            }
            strip_gradients(first_row, strip, first_key, begin, end);
            for (int panel = 0; panel < packed.panels.panels; ++panel) {
                const int first = packed.panels.first(panel) * kLanes, width = packed.panels.width(panel);
                tile_of<Math>(
                    width, slope_rows.get() + (strip * kTileRows * kKeys + begin) / Math::kStep, kKeys / Math::kStep,
                    keys_as_values.get() + packed.value_steps * first + int64_t{begin / Math::kStep} * width * kLanes,
                    (end - begin) / Math::kStep, grad_query.get() + (first_row + strip * kTileRows) * columns + first,
                    columns, kOnes);
            }
        }
        const int row_steps = kRows / Math::kStep;
        for (int64_t d = 0; d < query.dims; d += kTileRows)
            for (int c = begin; c < end; c += kPanelKeys) {
                const int64_t panel = c / kPanelKeys * int64_t{row_steps} * kPanelKeys;
                tile<Math, kTileVectors>(grad.block_columns(row_block) + d * row_steps, row_steps,
                                         probability.get() + panel, row_steps, value_gradient + d * kKeys + c, kKeys,
                                         kOnes);
                tile<Math, kTileVectors>(query.block_columns(row_block) + d * row_steps, row_steps,
                                         slope_panels.get() + panel, row_steps, key_gradient + d * kKeys + c, kKeys,
                                         kOnes);
            }
    }

    static constexpr float kOnes[kTileRows] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};

    void run(int64_t b, int64_t head, const KeyGradients& gradients, double* inv_freq) {
        const int64_t group = f.query_heads / f.key_heads, d = f.head_dim, columns = packed.panels.columns();
        const int64_t tokens = query_count(f, b), blocks = (tokens + kRows - 1) / kRows;
        pack_queries(b, head, blocks);
        std::memset(grad_query.get(), 0, sizeof(float) * blocks * kRows * columns);
        for (int64_t key_block = 0; key_block * kKeys < f.key_length[b]; ++key_block) {
            const int64_t first = key_block * kKeys;
            float* key_gradient = gradients.key + key_block * gradients.block_elements;
            float* value_gradient = gradients.value + key_block * gradients.block_elements;
            std::memset(key_gradient, 0, sizeof(float) * gradients.block_elements);
            std::memset(value_gradient, 0, sizeof(float) * gradients.block_elements);
            pack_keys(b, head / group, first, static_cast<int>(std::min<int64_t>(kKeys, f.key_length[b] - first)));
            for (int64_t row_block = 0; row_block < blocks; ++row_block)
                block(row_block, first, key_gradient, value_gradient);
        }
        for (int64_t i = 0; i < tokens; ++i) {
            const int64_t row = query_row(f, b, i);
            finish_row(b, query_position(f, b, i), row_of<T>(f.query, b, head, row), grad_query.get() + i * columns,
                       const_cast<T*>(row_of<T>(p.grad_query, b, head, row)), inv_freq, d);
        }
    }

    // Adds a row's part of the frequencies' gradient, rotates the row's gradient back and rounds it.
    void finish_row(int64_t b, int64_t position, const T* row, const float* gradient, T* to, double* inv_freq,
                    int64_t d) {
        const int pairs = f.rotation.pairs;
        float* cosines = angles.get();
        float* sines = cosines + pairs;
        rotation_row(f.rotation, b, position, cosines, sines);
        const bool reached = position >= f.rotation.start_tokens[f.rotation.regime_index[b]];
        if (inv_freq != nullptr && reached) {
            rotate_row(row, d, pairs, f.rotation.interleaved, cosines, sines, rows.get());
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

    // Sums dK and dV over the query heads of a key head, in the order of the heads, and writes a block of keys.
    void finish_keys(int64_t b, int64_t key_head, int64_t key_block, const KeyGradients* heads, double* inv_freq) {
        const int64_t group = f.query_heads / f.key_heads, d = f.head_dim, first = key_block * kKeys;
        const int count = static_cast<int>(std::min<int64_t>(kKeys, f.key_length[b] - first));
        std::vector<float> gradient(d);
        for (int k = 0; k < count; ++k) {
            const int64_t slot = f.key_start[b] + first + k;
            for (const bool is_value : {true, false}) {
                for (int64_t c = 0; c < d; ++c) {
                    float sum = 0.0f;
                    for (int64_t g = 0; g < group; ++g) {
                        const float* from = (is_value ? heads[g].value : heads[g].key);
                        sum += from[key_block * heads[g].block_elements + c * kKeys + k];
                    }
                    gradient[c] = sum;
                }
                if (is_value) {
                    T* to = const_cast<T*>(row_of<T>(p.grad_value, b, key_head, slot));
                    for (int64_t c = 0; c < d; ++c) narrow(gradient[c], to + c);
                } else {
                    finish_row(b, key_position(f, b, first + k), row_of<T>(f.key, b, key_head, slot), gradient.data(),
                               const_cast<T*>(row_of<T>(p.grad_key, b, key_head, slot)), inv_freq, d);
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
    int64_t key_blocks = 0;
    for (int64_t b = 0; b < f.batch; ++b) key_blocks = std::max(key_blocks, (f.key_length[b] + kKeys - 1) / kKeys);
    const int64_t dims = (f.head_dim + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t block_elements = dims * kKeys, head_elements = 2 * key_blocks * block_elements;

    // Key heads go through the scratch in groups that fit it.
    const int64_t all = f.batch * f.key_heads;
    const int64_t bytes = std::max<int64_t>(group * head_elements * static_cast<int64_t>(sizeof(float)), 1);
    const int64_t fit = std::clamp<int64_t>(kScratchBytes / bytes, 1, all);
    const Buffer<float> scratch = allocate<float>(fit * group * head_elements);
    // Parts of the frequencies' gradient: one row a query head, one a block of keys; added up in that order.
    const int64_t parts = group + key_blocks;
    std::vector<double> frequency(p.grad_inv_freq ? fit * parts * pairs : 0);

    for (int64_t done = 0; done < all; done += fit) {
        const int64_t count = std::min(fit, all - done);
        std::vector<KeyGradients> heads(count * group);
        for (int64_t i = 0; i < count * group; ++i) {
            float* first = scratch.get() + i * head_elements;
            heads[i] = {block_elements, first, first + key_blocks * block_elements};
        }
        std::fill(frequency.begin(), frequency.end(), 0.0);
        const auto part = [&](int64_t pair, int64_t index) {
            return p.grad_inv_freq ? frequency.data() + (pair * parts + index) * pairs : nullptr;
        };
        std::atomic<int64_t> next_head{0}, next_block{0};
        run_workers(f.threads, [&](int) {
            HeadTask<T, Math> task(p, f.query_tokens);
            for (int64_t i; (i = next_head.fetch_add(1)) < count * group;) {
                const int64_t pair = i / group, b = (done + pair) / f.key_heads, key_head = (done + pair) % f.key_heads;
                task.run(b, key_head * group + i % group, heads[i], part(pair, i % group));
            }
        });
        run_workers(f.threads, [&](int) {
            HeadTask<T, Math> task(p, 0);
            for (int64_t i; (i = next_block.fetch_add(1)) < count * key_blocks;) {
                const int64_t pair = i / key_blocks, block = i % key_blocks, b = (done + pair) / f.key_heads;
                if (block * kKeys < f.key_length[b])
                    task.finish_keys(b, (done + pair) % f.key_heads, block, &heads[pair * group],
                                     part(pair, group + block));
            }
        });
        if (p.grad_inv_freq)
            for (int64_t pair = 0; pair < count; ++pair)
                for (int64_t index = 0; index < parts; ++index)
                    for (int64_t i = 0; i < pairs; ++i)
                        p.grad_inv_freq[(done + pair) / f.key_heads * pairs + i] += part(pair, index)[i];
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
