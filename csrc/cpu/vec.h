// Vectors of fp32 at the width of the instruction set this file is compiled for. Everything here has internal linkage:
// one source is compiled several times, and the linker must never merge functions of different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "../core/params.h"
#include "../core/phase.h"

namespace longrope {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // 6 x 4 accumulators, 4 operands and a broadcast: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // 6 x 2 accumulators, 2 operands and a broadcast: 15 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int kCacheLine = 64;
constexpr float kLog2E = 1.44269504088896341f;

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline vf splat(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#elif defined(__SSE2__)
    return _mm_set1_ps(x);
#else
    return vf{x, x, x, x};
#endif
}

inline vi iota() {
    vi v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline vf vsqrt(vf x) {
    vf root;
    for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(x[i]);
    return root;
}

// Keeps x from becoming the memory operand of every instruction that uses it.
inline vf in_register(vf x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
    return x;
}

// Lane i of the result is lane i + by of v, around the end.
inline vf turned(vf v, int by) {
    return __builtin_shuffle(v, (iota() + by) & (kLanes - 1));
}

inline float reduce_max(vf v) {
    for (int half = kLanes / 2; half; half /= 2) v = vmax(v, turned(v, half));
    return v[0];
}

// Asks for bytes [from, to) of a row, into L2: its queue of misses is longer than L1's, which a stream from memory
// fills (a decode of bf16 keys took 1.4 times as long with prefetches into L1, on Zen 4).
inline __attribute__((always_inline)) void prefetch_row(const void* row, int64_t from, int64_t to) {
    for (int64_t at = from; at < to; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}

// Pairwise, so that the order of additions is the same at every call.
inline float reduce_add(vf v) {
    for (int half = kLanes / 2; half; half /= 2) v += turned(v, half);
    return v[0];
}

#if defined(__AVX512DQ__)
// 2^x as 2^floor(x) times a polynomial of the rest, in [0, 1): an instruction for each end, which take infinities too.
template <int Degree>
inline vf exp2_by(vf x, const float (&coefficients)[Degree + 1]) {
    const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    vf p = splat(coefficients[Degree]);
#pragma GCC unroll 8
    for (int i = Degree - 1; i >= 0; --i) p = p * f + coefficients[i];
    return _mm512_scalef_ps(p, x);
}
#endif

// 2^x for x <= 127, to 2e-7 relative; 0 far below and at -inf; not a number of what is none.
inline vf exp2v(vf x) {
#if defined(__AVX512DQ__)
    return exp2_by<5>(x, {0.99999994f, 0.69315308f, 0.24015361f, 0.055826318f, 0.0089893397f, 0.0018775767f});
#else
    const vf clamped = vmax(splat(-200.0f), x);  // in this order a NaN stays one
    const vf magic = splat(12582912.0f);         // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = clamped + magic;
    const vf whole = shifted - magic;
    const vf f = clamped - whole;
    vf p = splat(0.0013264727252628313f);
    p = p * f + 0.00967151278577525f;
    p = p * f + 0.05550733744471168f;
    p = p * f + 0.24022242083111842f;
    p = p * f + 0.6931469775976784f;
    p = p * f + 1.0f;
    vi bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof bits);
    return x >= -126.0f ? (x < 128.0f ? p : f) : x < -126.0f ? splat(0.0f) : x;
#endif
}

#if defined(__AVX512BF16__)
// The same to 3e-6, for what is then rounded to bf16, whose steps are 4e-3.
inline vf exp2_for_bf16(vf x) {
    return exp2_by<4>(x, {1.0000026f, 0.69300383f, 0.24144275f, 0.05201146f, 0.013534168f});
}
#endif

// tanh to 2e-7 absolute and relative: 1 - 2 / (e^2x + 1) away from zero, a polynomial near it.
inline vf tanhv(vf x) {
    const vf magnitude = vmax(x, -x);
    const vf e = exp2v(vmax(splat(-100.0f), magnitude * -2.88539008177792681f));  // e^(-2|x|)
    const vf far = (1.0f - e) / (1.0f + e);
    const vf x2 = x * x;
    const vf near =
        magnitude +
        magnitude * x2 *
            (-0.333333333f + x2 * (0.133333333f + x2 * (-0.0539682540f + x2 * (0.0218694885f + x2 * -0.00886323553f))));
    const vf value = magnitude < 0.25f ? near : far;
    return x < 0.0f ? -value : value;
}

// Lane k of the result is the sum of the lanes of v[k], for as many vectors of 4-byte numbers as there are lanes. Four
// vectors become one within their 16-byte parts, and those are added across.
template <class V>
inline V lane_sums(const V* v) {
    constexpr int kCount = sizeof(V) / 4;
    typedef decltype(V() < V()) Lanes;  // integers
    V level[kCount];
    Lanes low4, high4, low8, high8;  // halves of the 16-byte parts, interleaved by one number and by two
    for (int i = 0; i < kCount; ++i) {
        const int part = i / 4 * 4, at = i % 4;
        low4[i] = part + at / 2 + at % 2 * kCount;
        high4[i] = low4[i] + 2;
        low8[i] = part + at % 2 + at / 2 * kCount;
        high8[i] = low8[i] + 2;
    }
    for (int i = 0; i < kCount; i += 4) {
        const V a = __builtin_shuffle(v[i], v[i + 1], low4) + __builtin_shuffle(v[i], v[i + 1], high4);
        const V b = __builtin_shuffle(v[i + 2], v[i + 3], low4) + __builtin_shuffle(v[i + 2], v[i + 3], high4);
        level[i / 4] = __builtin_shuffle(a, b, low8) + __builtin_shuffle(a, b, high8);
    }
    Lanes even, odd;  // parts of two vectors side by side
    for (int i = 0; i < kCount; ++i) {
        even[i] = i / 4 * 8 + i % 4;
        odd[i] = even[i] + 4;
    }
    for (int count = kCount / 4; count > 1; count /= 2)
        for (int i = 0; i < count / 2; ++i)
            level[i] = __builtin_shuffle(level[2 * i], level[2 * i + 1], even) +
                       __builtin_shuffle(level[2 * i], level[2 * i + 1], odd);
    return level[0];
}

// Lane i of rows[j] and lane j of rows[i] change places, for kLanes rows.
template <class V>
inline void transpose(V* rows) {
#pragma GCC unroll 4
    for (int half = 1; half < kLanes; half *= 2) {
        vi upper, lower;  // the blocks off the diagonal change places
        for (int j = 0; j < kLanes; ++j) {
            upper[j] = j & half ? kLanes + j - half : j;
            lower[j] = j & half ? kLanes + j : j + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (i & half) continue;
            const V above = rows[i], below = rows[i + half];
            rows[i] = __builtin_shuffle(above, below, upper);
            rows[i + half] = __builtin_shuffle(above, below, lower);
        }
    }
}

struct BFloat16 {
    uint16_t bits;
};

inline float widen(int8_t x) {
    return x;
}
inline float widen(float x) {
    return x;
}
inline float widen(_Float16 x) {
    return static_cast<float>(x);
}

inline float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// kLanes neighbouring values as fp32.
template <class S>
inline vf widen_lanes(const S* p) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, BFloat16>)
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
    if constexpr (std::is_same_v<S, _Float16>) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    if constexpr (std::is_same_v<S, int8_t>)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<S, BFloat16>)
        return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
    if constexpr (std::is_same_v<S, _Float16>) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    if constexpr (std::is_same_v<S, int8_t>)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
    if constexpr (std::is_same_v<S, float>) {
        return load<vf>(p);
    } else {
        float wide[kLanes];
        for (int i = 0; i < kLanes; ++i) wide[i] = widen(p[i]);
        return load<vf>(wide);
    }
}

inline void narrow(float x, float* to) {
    *to = x;
}
inline void narrow(float x, _Float16* to) {
    *to = static_cast<_Float16>(x);
}

// Round to nearest even; a NaN stays one.
inline void narrow(float x, BFloat16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// cos and sin, times the attention factor, of every pair at one position of sequence b.
inline void rotation_row(const Rotation& rotation, int64_t b, int64_t position, float* cosines, float* sines) {
    const int64_t regime = rotation.regime_index[b];
    const bool below = position < rotation.start_tokens[regime];
    const int64_t* turns = (below ? rotation.base_turns : rotation.turns) + regime * rotation.pairs;
    const float factor = rotation.attention_factor[regime];
    for (int pair = 0; pair < rotation.pairs; ++pair) {
        const CosSin value = cos_sin(phase_of(position, turns[pair]));
        cosines[pair] = value.cos * factor;
        sines[pair] = value.sin * factor;
    }
}

// Rotate one row of head_dim values in fp32 and round it to T, as every backend must before a product.
template <class S, class T>
inline void rotate_row(const S* row, int64_t head_dim, int pairs, bool interleaved, const float* cosines,
                       const float* sines, T* to) {
    if (interleaved) {
        for (int i = 0; i < pairs; ++i) {
            const float a = widen(row[2 * i]), b = widen(row[2 * i + 1]);
            narrow(a * cosines[i] - b * sines[i], to + 2 * i);
            narrow(b * cosines[i] + a * sines[i], to + 2 * i + 1);
        }
    } else {
        for (int i = 0; i < pairs; ++i) {
            const float a = widen(row[i]), b = widen(row[i + pairs]);
            narrow(a * cosines[i] - b * sines[i], to + i);
            narrow(b * cosines[i] + a * sines[i], to + i + pairs);
        }
    }
    for (int64_t i = 2 * pairs; i < head_dim; ++i) narrow(widen(row[i]), to + i);
}

}  // namespace
}  // namespace longrope
