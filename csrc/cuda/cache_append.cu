// Appending to a cache of unrotated keys.
//
// A plain cache takes keys and values as they are: a thread moves 16 bytes of each. A quantised one takes, as int8 or
// fp8, values with one scale a token, and keys with one scale a channel for every whole group of 64; a thread has 8
// channels of some of the 64 tokens of its block, and keeps them in registers while the scale is found. Keys of the
// group that is not whole wait in the tail as they came. Groups that this append completes are read from the tail
// before the next launch writes over it.
//
// Bytes: each value is read and written once, keys of a group twice; quantised they leave as one byte each, with 4 for
// each scale. Operations: none in a plain cache; about 8 an element in a quantised one (the largest magnitude, a
// product, two limits, a rounding). Bound by memory.
#include <cmath>

#include "kernels.h"
#include "rows.cuh"
#include "sequence.cuh"

namespace longrope {
namespace {

constexpr int kThreads = 128;

struct AppendLaunch {
    AppendParams params;
    int64_t tokens;
};

// Tokens that a sequence takes: no more than there are and than it has room for, whatever the device was told.
LONGROPE_DEVICE int64_t count_of(const AppendLaunch& launch, int64_t b, int64_t length) {
    const Pages& pages = launch.params.pages;
    const int64_t count = load_global(launch.params.count + b), room = pages.pages_per_sequence * pages.page_tokens;
    const int64_t most = launch.tokens < room - length ? launch.tokens : room - length;
    return count < most ? count : most;
}

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

// Two values as the low bytes of a word, to nearest even; what is not a number becomes 0.
template <class Q>
LONGROPE_DEVICE uint32_t quantise_two(float low, float high, float inverse_low, float inverse_high) {
    low *= inverse_low;
    high *= inverse_high;
    low = low == low ? low : 0.0f;
    high = high == high ? high : 0.0f;
    if constexpr (std::is_same_v<Q, Fp8>) return narrow_fp8(low, high);
    // An integer added to 1.5 2^23 is what its last bits say; a conversion has a quarter of the rate.
    const auto byte = [](float x) { return as_bits(fminf(fmaxf(x, -127.0f), 127.0f) + 12582912.0f) & 0xffu; };
    return byte(low) | byte(high) << 8;
}

template <class T>
LONGROPE_KERNEL(kThreads)
append_plain_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t chunks = p.head_dim / 8, at = block_index() * kThreads + thread_index();
    const int chunk = static_cast<int>(at % chunks);
    const int64_t t = at / chunks % launch.tokens, head = at / chunks / launch.tokens % p.key_heads;
    const int64_t b = at / chunks / launch.tokens / p.key_heads;
    if (b >= p.batch) return;
    const int64_t length = load_global(p.length + b);
    if (t >= count_of(launch, b, length)) return;
    const Slot to = slot_of(p.pages, b, length + t);
    const auto move = [&](const Operand& from, const Operand& pages) {
        GlobalRow<T>{row_of<T>(pages, to.outer, head, to.token)}.store16(
            chunk, load_global(reinterpret_cast<const Vec16*>(row_of<T>(from, b, head, t) + chunk * 8)));
    };
    move(p.key, p.key_pages);
    move(p.value, p.value_pages);
}

// What a thread has of the 64 tokens of a block: chunk `chunk` of tokens first, first + kStep and on. Threads whose
// chunk lies past head_dim have none; kWidth is a power of two, so that the threads of a token are neighbours in one
// warp.
template <int kWidth>
struct Part {
    static constexpr int kStep = kThreads / kWidth, kTokens = kKeyGroup / kStep;
    int first, chunk;

    LONGROPE_DEVICE Part() : first(thread_index() / kWidth), chunk(thread_index() % kWidth) {}
    LONGROPE_DEVICE bool in(int head_dim) const { return chunk * 8 < head_dim; }
};

// 8 channels of a token, quantised, to their row.
template <class Q>
LONGROPE_DEVICE void store_quantised(Q* row, int chunk, const Float8& x, const Float8& inverse) {
    Vec8 bytes{};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const uint32_t both = quantise_two<Q>(x.at[i], x.at[i + 1], inverse.at[i], inverse.at[i + 1]);
        bytes.word[i / 4] |= both << 8 * (i % 4);
    }
    store_global(reinterpret_cast<Vec8*>(row + 8 * chunk), bytes);
}

template <class T, class Q, int kWidth>
LONGROPE_KERNEL(kThreads)
quantise_values_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t blocks = (launch.tokens + kKeyGroup - 1) / kKeyGroup;  // of a head
    const int64_t head = block_index() / blocks % p.key_heads, b = block_index() / blocks / p.key_heads;
    const int64_t begin = block_index() % blocks * kKeyGroup, length = load_global(p.length + b);
    const int64_t left = count_of(launch, b, length) - begin;
    const Part<kWidth> me;
    const bool in = me.in(static_cast<int>(p.head_dim));
    // Whole warps leave, or none of their lanes.
    for (int t = me.first; t - me.first % (32 / kWidth) < left && t < kKeyGroup; t += me.kStep) {
        Float8 x{};
        if (in && t < left) x = GlobalRow<T>{row_of<T>(p.value, b, head, begin + t)}.load8(me.chunk);
        Scale<Q> measured;
#pragma unroll
        for (int i = 0; i < 8; ++i) measured.add(x.at[i]);
#pragma unroll
        for (int mask = kWidth / 2; mask > 0; mask /= 2) {
            measured.largest = fmaxf(measured.largest, shuffle_xor(measured.largest, mask));
            measured.poison += shuffle_xor(measured.poison, mask);
        }
        if (!in || t >= left) continue;
        const float scale = measured.value(), inverse = inverse_of(scale);
        const Slot to = slot_of(p.pages, b, length + begin + t);
        Float8 inverses;
#pragma unroll
        for (int i = 0; i < 8; ++i) inverses.at[i] = inverse;
        store_quantised(row_of<Q>(p.value_pages, to.outer, head, to.token), me.chunk, x, inverses);
        if (me.chunk == 0) store_global(const_cast<float*>(value_scale(p, to, head)), scale);
    }
}

template <class T, class Q, int kWidth>
LONGROPE_KERNEL(kThreads)
quantise_groups_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t most = launch.tokens / kKeyGroup + 1;  // groups that an append can complete
    const int64_t head = block_index() / most % p.key_heads, b = block_index() / most / p.key_heads;
    const int64_t length = load_global(p.length + b), end = length + count_of(launch, b, length);
    const int64_t first = (length / kKeyGroup + block_index() % most) * kKeyGroup;
    if (first + kKeyGroup > end) return;
    using P = Part<kWidth>;
    const P me;
    const bool in = me.in(static_cast<int>(p.head_dim));
    Vec16 keys[P::kTokens] = {};
    if (in) {
#pragma unroll
        for (int i = 0; i < P::kTokens; ++i) {
            const int k = me.first + i * P::kStep;
            const T* row = first + k < length ? row_of<T>(p.pages.key_tail, b, head, k)
                                              : row_of<T>(p.key, b, head, first + k - length);
            keys[i] = load_global(reinterpret_cast<const Vec16*>(row + 8 * me.chunk));
        }
    }
    Scale<Q> measured[8];
#pragma unroll
    for (int i = 0; i < P::kTokens; ++i) {
        const Float8 x = unpack8<T>(keys[i]);
#pragma unroll
        for (int d = 0; d < 8; ++d) measured[d].add(x.at[d]);
    }
    // What each part of the tokens has at most, and its poison, [kStep][kWidth][8] each.
    const auto place = [&](int part) { return static_cast<SharedAddress>((part * kWidth + me.chunk) * 8 * 4); };
    constexpr SharedAddress kPoison = kThreads * 8 * 4;
#pragma unroll
    for (int d = 0; d < 8; d += 4) {
        Float4 largest, poison;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            largest.at[i] = measured[d + i].largest;
            poison.at[i] = measured[d + i].poison;
        }
        store_shared(place(me.first) + 4 * d, largest);
        store_shared(kPoison + place(me.first) + 4 * d, poison);
    }
    block_sync();
    if (!in) return;
    const Slot group = slot_of(p.pages, b, first);
    float* scales = const_cast<float*>(key_scale(p, group, head)) + 8 * me.chunk;
    Float8 inverses;
#pragma unroll
    for (int d = 0; d < 8; d += 4) {
        Scale<Q> all[4];
#pragma unroll
        for (int part = 0; part < P::kStep; ++part) {
            const Float4 largest = load_shared<Float4>(place(part) + 4 * d);
            const Float4 poison = load_shared<Float4>(kPoison + place(part) + 4 * d);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                all[i].largest = fmaxf(all[i].largest, largest.at[i]);
                all[i].poison += poison.at[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float scale = all[i].value();
            inverses.at[d + i] = inverse_of(scale);
            if (me.first == 0) store_global(scales + d + i, scale);
        }
    }
#pragma unroll
    for (int i = 0; i < P::kTokens; ++i)
        store_quantised(row_of<Q>(p.key_pages, group.outer, head, group.token + me.first + i * P::kStep), me.chunk,
                        unpack8<T>(keys[i]), inverses);
}

// The last keys, up to 64 of them, to their places in the tail.
template <class T>
LONGROPE_KERNEL(kThreads)
append_tail_kernel(const AppendLaunch launch) {
    const AppendParams& p = launch.params;
    const int64_t head = block_index() % p.key_heads, b = block_index() / p.key_heads;
    const int64_t length = load_global(p.length + b), count = count_of(launch, b, length);
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
    const auto quantise_to = [&](auto q, auto width) {
        using Q = decltype(q);
        constexpr int kWidth = decltype(width)::value;
        launch(quantise_values_kernel<T, Q, kWidth>, heads * ((tokens + kKeyGroup - 1) / kKeyGroup), kThreads, 0,
               arguments, stream);
        launch(quantise_groups_kernel<T, Q, kWidth>, heads * (tokens / kKeyGroup + 1), kThreads,
               2 * kThreads * 8 * static_cast<int>(sizeof(float)), arguments, stream);
    };
    const auto quantise_in = [&](auto width) {
        if (p.pages.stored == Stored::kFp8)
            quantise_to(Fp8{}, width);
        else
            quantise_to(int8_t{}, width);
    };
    if (p.head_dim <= 64)
        quantise_in(std::integral_constant<int, 8>{});
    else if (p.head_dim <= 128)
        quantise_in(std::integral_constant<int, 16>{});
    else
        quantise_in(std::integral_constant<int, 32>{});
    launch(append_tail_kernel<T>, heads, kThreads, 0, arguments, stream);
}

}  // namespace

void cache_append(const AppendParams& params, int64_t tokens, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run<Half>(params, tokens, stream);
    run<BFloat16Bits>(params, tokens, stream);
}

}  // namespace longrope
