// Appending to a cache of unrotated keys.
//
// A plain cache takes keys and values as they are: a thread moves 16 bytes of each. A quantised one takes, as int8 or
// fp8, values with one scale a token (a warp each), and keys with one scale a channel for every whole group of 64 (a
// block each, a thread a channel); keys of the group that is not whole wait in the tail as they came. Groups that this
// append completes are read from the tail before the next launch writes over it.
//
// Bytes: each value is read and written once, keys of a group twice. Bound by memory.
#include <cmath>

#include "kernels.h"
#include "rows.cuh"
#include "sequence.cuh"

namespace longrope {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct AppendLaunch {
    AppendParams params;
    int64_t tokens;
};

// The scale that maps the largest magnitude to that of the format; NaN where a value is not finite, so that reading
// shows it.
template <class Q>
struct Scale {
    float largest = 0.0f, poison = 0.0f;

    LONGROPE_DEVICE void add(float x) {
        largest = fmaxf(largest, fabsf(x));
        poison += x * 0.0f;
    }
    LONGROPE_DEVICE float value() const { return largest / Quantised<Q>::kLargest + poison; }
};

// Where it is no number, values are too small to tell apart: they become 0.
LONGROPE_DEVICE float inverse_of(float scale) {
    const float inverse = 1.0f / scale;
    return scale > 0.0f && inverse < INFINITY ? inverse : 0.0f;
}

// To nearest even; what is not a number becomes 0.
template <class Q>
LONGROPE_DEVICE Q quantise(float x, float inverse) {
    const float scaled = x * inverse == x * inverse ? x * inverse : 0.0f;
    if constexpr (std::is_same_v<Q, Fp8>)
        return Fp8{static_cast<uint8_t>(narrow_fp8(scaled, 0.0f))};
    else
        return static_cast<int8_t>(fminf(fmaxf(rintf(scaled), -127.0f), 127.0f));
}

template <class T>
LONGROPE_KERNEL(kThreads)
append_plain_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t chunks = p.head_dim / 8, at = block_index() * kThreads + thread_index();
    const int chunk = static_cast<int>(at % chunks);
    const int64_t t = at / chunks % launch.tokens, head = at / chunks / launch.tokens % p.key_heads;
    const int64_t b = at / chunks / launch.tokens / p.key_heads;
    if (b >= p.batch || t >= load_global(p.count + b)) return;
    const Slot to = slot_of(p.pages, b, load_global(p.length + b) + t);
    const auto move = [&](const Operand& from, const Operand& pages) {
        GlobalRow<T>{row_of<T>(pages, to.outer, head, to.token)}.store16(
            chunk, load_global(reinterpret_cast<const Vec16*>(row_of<T>(from, b, head, t) + chunk * 8)));
    };
    move(p.key, p.key_pages);
    move(p.value, p.value_pages);
}

template <class T, class Q>
LONGROPE_KERNEL(kThreads)
quantise_values_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t at = block_index() * kWarps + warp_index();
    const int64_t t = at % launch.tokens, head = at / launch.tokens % p.key_heads, b = at / launch.tokens / p.key_heads;
    if (b >= p.batch || t >= load_global(p.count + b)) return;
    const GlobalRow<T> from{row_of<T>(p.value, b, head, t)};
    const int head_dim = static_cast<int>(p.head_dim);
    Scale<Q> measured;
    for (int d = lane_index(); d < head_dim; d += 32) measured.add(from.load1(d));
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        measured.largest = fmaxf(measured.largest, shuffle_xor(measured.largest, mask));
        measured.poison += shuffle_xor(measured.poison, mask);
    }
    const float scale = measured.value(), inverse = inverse_of(scale);
    const Slot to = slot_of(p.pages, b, load_global(p.length + b) + t);
    Q* row = row_of<Q>(p.value_pages, to.outer, head, to.token);
    for (int d = lane_index(); d < head_dim; d += 32) store_global(row + d, quantise<Q>(from.load1(d), inverse));
    if (lane_index() == 0) store_global(const_cast<float*>(value_scale(p, to, head)), scale);
}

template <class T, class Q>
LONGROPE_KERNEL(kThreads)
quantise_groups_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t most = launch.tokens / kKeyGroup + 1;  // groups that an append can complete
    const int64_t head = block_index() / most % p.key_heads, b = block_index() / most / p.key_heads;
    const int64_t length = load_global(p.length + b), end = length + load_global(p.count + b);
    const int64_t first = (length / kKeyGroup + block_index() % most) * kKeyGroup;
    if (first + kKeyGroup > end) return;
    const Slot group = slot_of(p.pages, b, first);
    float* scales = const_cast<float*>(key_scale(p, group, head));
    for (int d = thread_index(); d < p.head_dim; d += kThreads) {
        const auto key = [&](int k) {
            T* row = first + k < length ? row_of<T>(p.pages.key_tail, b, head, k)
                                        : row_of<T>(p.key, b, head, first + k - length);
            return GlobalRow<T>{row}.load1(d);
        };
        Scale<Q> measured;
        for (int k = 0; k < kKeyGroup; ++k) measured.add(key(k));
        const float scale = measured.value(), inverse = inverse_of(scale);
        store_global(scales + d, scale);
        for (int k = 0; k < kKeyGroup; ++k)
            store_global(row_of<Q>(p.key_pages, group.outer, head, group.token + k) + d, quantise<Q>(key(k), inverse));
    }
}

// The last keys, up to 64 of them, to their places in the tail.
template <class T>
LONGROPE_KERNEL(kThreads)
append_tail_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t head = block_index() % p.key_heads, b = block_index() / p.key_heads;
    const int64_t length = load_global(p.length + b), count = load_global(p.count + b);
    const int64_t first = count > kKeyGroup ? count - kKeyGroup : 0;
    const int chunks = static_cast<int>(p.head_dim) / 8;
    for (int i = thread_index(); i < (count - first) * chunks; i += kThreads) {
        const int64_t t = first + i / chunks;
        const T* from = row_of<T>(p.key, b, head, t) + i % chunks * 8;
        GlobalRow<T>{row_of<T>(p.pages.key_tail, b, head, (length + t) % kKeyGroup)}.store16(
            i % chunks, load_global(reinterpret_cast<const Vec16*>(from)));
    }
}

template <class T>
void run(const AppendParams& p, int64_t tokens, Stream stream) {
    const AppendLaunch arguments{p, tokens};
    const int64_t heads = p.batch * p.key_heads;
    if (p.pages.key_scale == nullptr) {
        const int64_t moves = heads * tokens * (p.head_dim / 8);
        return launch(append_plain_kernel<T>, (moves + kThreads - 1) / kThreads, kThreads, 0, arguments, stream);
    }
    if (tokens == 0) return;
    const auto quantise_to = [&](auto q) {
        using Q = decltype(q);
        launch(quantise_values_kernel<T, Q>, (heads * tokens + kWarps - 1) / kWarps, kThreads, 0, arguments, stream);
        launch(quantise_groups_kernel<T, Q>, heads * (tokens / kKeyGroup + 1), kThreads, 0, arguments, stream);
    };
    if (p.pages.stored == Stored::kFp8)
        quantise_to(Fp8{});
    else
        quantise_to(int8_t{});
    launch(append_tail_kernel<T>, heads, kThreads, 0, arguments, stream);
}

}  // namespace

void cache_append(const AppendParams& params, int64_t tokens, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run<Half>(params, tokens, stream);
    run<BFloat16Bits>(params, tokens, stream);
}

}  // namespace longrope
