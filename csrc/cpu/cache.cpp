// Appending to a cache of unrotated keys, for one instruction set.
//
// A plain cache takes keys and values as they are. A quantised one takes values as int8 with one scale a token, and
// keys as int8 with one scale a channel for groups of 64 tokens: half the error of a scale a token, since unrotated
// keys have channels that are large in every token (bench/quantised_cache.py). Keys of a group that is not whole wait
// in the tail as they came, so what the cache holds does not depend on how the appending was cut.
//
// Bytes: each value is read and written once. Bound by memory.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace longrope {
namespace {

// Rounds to nearest even.
inline int8_t quantise(float x, float inverse) {
    const float scaled = std::nearbyint(x * inverse);
    return scaled == scaled ? static_cast<int8_t>(std::clamp(scaled, -127.0f, 127.0f)) : int8_t{0};
}

inline float inverse_of(float scale) {
    // A scale whose inverse is no number belongs to values too small for int8 steps: they become 0.
    return scale >= 1.0f / std::numeric_limits<float>::max() ? 1.0f / scale : 0.0f;
}

// The scale that maps the largest magnitude to 127; a NaN where a value is not finite, so that reading shows it.
struct Scale {
    float largest = 0.0f, poison = 0.0f;

    void add(float x) {
        largest = std::max(largest, std::fabs(x));
        poison += x * 0.0f;
    }
    float value() const { return largest / 127.0f + poison; }
};

template <class T>
struct Appender {
    const AppendParams& p;

    template <class S>
    static S* written(const Operand& x, int64_t outer, int64_t head, int64_t token) {
        return const_cast<S*>(row_of<S>(x, outer, head, token));
    }

    void head(int64_t b, int64_t head) const {
        const int64_t d = p.head_dim, bytes = d * static_cast<int64_t>(sizeof(T));
        for (int64_t t = 0; t < p.count[b]; ++t) {
            const int64_t index = p.length[b] + t;
            const Slot to = slot_of(p.pages, b, index);
            const T *key = row_of<T>(p.key, b, head, t), *value = row_of<T>(p.value, b, head, t);
            if (p.pages.key_scale == nullptr) {
                std::memcpy(static_cast<void*>(written<T>(p.key_pages, to.outer, head, to.token)), key, bytes);
                std::memcpy(static_cast<void*>(written<T>(p.value_pages, to.outer, head, to.token)), value, bytes);
                continue;
            }
            quantise_value(value, to, head);
            std::memcpy(static_cast<void*>(written<T>(p.pages.key_tail, b, head, index % kKeyGroup)), key, bytes);
            if (index % kKeyGroup == kKeyGroup - 1) quantise_group(b, head, index / kKeyGroup * kKeyGroup);
        }
    }

    void quantise_value(const T* value, const Slot& to, int64_t head) const {
        Scale measured;
        for (int64_t d = 0; d < p.head_dim; ++d) measured.add(widen(value[d]));
        const float scale = measured.value(), inverse = inverse_of(scale);
        int8_t* row = written<int8_t>(p.value_pages, to.outer, head, to.token);
        for (int64_t d = 0; d < p.head_dim; ++d) row[d] = quantise(widen(value[d]), inverse);
        const_cast<float*>(p.pages.value_scale)[value_scale_index(p.pages, to, p.key_heads, head)] = scale;
    }

    void quantise_group(int64_t b, int64_t head, int64_t first) const {
        std::vector<Scale> measured(p.head_dim);
        for (int k = 0; k < kKeyGroup; ++k) {
            const T* row = row_of<T>(p.pages.key_tail, b, head, k);
            for (int64_t d = 0; d < p.head_dim; ++d) measured[d].add(widen(row[d]));
        }
        const Slot group = slot_of(p.pages, b, first);
        float* scales =
            const_cast<float*>(p.pages.key_scale) + key_scale_index(p.pages, group, p.key_heads, head, p.head_dim);
        std::vector<float> inverse(p.head_dim);
        for (int64_t d = 0; d < p.head_dim; ++d) {
            scales[d] = measured[d].value();
            inverse[d] = inverse_of(scales[d]);
        }
        for (int k = 0; k < kKeyGroup; ++k) {
            const T* row = row_of<T>(p.pages.key_tail, b, head, k);
            int8_t* to = written<int8_t>(p.key_pages, group.outer, head, group.token + k);
            for (int64_t d = 0; d < p.head_dim; ++d) to[d] = quantise(widen(row[d]), inverse[d]);
        }
    }
};

template <class T>
void append(const AppendParams& p) {
    const Appender<T> appender{p};
    std::atomic<int64_t> next{0};
    const int64_t tasks = p.batch * p.key_heads;
    run_workers(static_cast<int>(std::clamp<int64_t>(tasks, 1, p.threads)), [&](int) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) appender.head(task / p.key_heads, task % p.key_heads);
    });
}

}  // namespace

void LONGROPE_LEVEL(cache_append)(const AppendParams& p) {
    switch (p.dtype) {
        case Dtype::kFloat32:
            return append<float>(p);
        case Dtype::kFloat16:
            return append<_Float16>(p);
        case Dtype::kBFloat16:
            return append<BFloat16>(p);
    }
}

}  // namespace longrope
