// Scores and weighted values of int8 caches in 16-bit integers, for bf16 queries and rows whose dims all rotate, halves
// apart, a multiple of 32 each.
//
// A core multiplies 16-bit integers in pairs, with sums in 32 bits, twice as fast as fp32, and an int8 is an int16 by
// an unpacking with zeros, without a conversion. Key j of a block is x * 2^6 * ratio, rotated by the angle of j alone
// with rounded products (vpmulhrsw): the larger of a pair's two scales goes to the query, `ratio` is what the other
// lacks. The query, rotated in fp32, is rounded so that its norm times a key's cannot pass 2^31. Both errors are about
// 2^-13 of an operand's norm, where rounding to bf16 costs 2^-9 of each element. Where scores in the hundreds are
// possible the former would show, and the group is multiplied in floating point. Weights have 15 bits of a block's
// largest, also where bf16 has 8 of each. Values are taken as v + 128, which needs no sign; 128 times the weights is
// taken off.
//
// Operations in vectors of 64 bytes, head_dim 128 and 4 query rows: a key takes 4 to unpack, 12 products and 4 sums to
// rotate, 16 products with the query, 11 to transpose the sums; a value 2 + 6 to pair with its neighbour and 16
// products; the softmax about 5, the query's rotation and rounding, shared by 64 keys, 6. That is 82, 48 of them
// multiplications, of which Zen 4 takes one a cycle (with rotations: vpmulhrsw, vpdpwssd and vfmadd share the ports).
// 89 cycles were measured from L2, 36 for scores alone and 21 for values; reading 268 bytes takes 66 at 15 GB/s a core,
// and the two are not fully hidden behind each other.
#pragma once

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace longrope {
namespace {

#if defined(__AVX512BW__)
#define LONGROPE_INTEGER_DECODE 1
constexpr int kIntegerBytes = 64;  // of the widest vector
#elif defined(__AVX2__)
#define LONGROPE_INTEGER_DECODE 1
constexpr int kIntegerBytes = 32;
#endif

#if defined(LONGROPE_INTEGER_DECODE)

constexpr int kTurnBits = 14;  // of cos, sin and the ratios: 1 is 2^14
constexpr int kKeyBits = 6;    // a rotated key is 2^6 of its int8 steps
constexpr float kMostInt16 = 32767.0f;
constexpr int kInt8Rows = 4;  // whose sums of 4 vectors each are in registers at once

// The largest norm of a key's int8 steps: -128 may be among them.
inline float key_norm(int64_t head_dim) {
    return 128.0f * std::sqrt(static_cast<float>(head_dim));
}

// The largest norm of a rounded query: its sum of products with any key passes neither 2^31 nor, a dim at a time, 2^15.
// Rounding both adds less than 0.2%.
inline float most_query_norm(int64_t head_dim) {
    return std::min(kMostInt16, 2147483647.0f / ((1 << kKeyBits) * key_norm(head_dim))) / 1.002f;
}

// Whether n int8 fill vectors of the widest kind; 32 bytes are taken where not.
inline bool fills_widest(int64_t n) {
    return n % kIntegerBytes == 0;
}

// Vectors of `Bytes` bytes, of whatever integers.
template <int Bytes>
struct Integers;

template <>
struct Integers<32> {
    typedef __m256i Vector;
    typedef __m256 Floats;
    static Floats to_float(Vector x) { return _mm256_cvtepi32_ps(x); }
    static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector splat32(int32_t x) { return _mm256_set1_epi32(x); }
    static Vector unpack_low8(Vector a, Vector b) { return _mm256_unpacklo_epi8(a, b); }
    static Vector unpack_high8(Vector a, Vector b) { return _mm256_unpackhi_epi8(a, b); }
    static Vector multiply_high(Vector a, Vector b) { return _mm256_mulhrs_epi16(a, b); }  // a b / 2^15, rounded
    static Vector add16(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
    static Vector subtract16(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
    static Vector flip_signs8(Vector a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }
    // sum + a b of neighbouring 16-bit integers.
    static Vector dot(Vector sum, Vector a, Vector b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpwssd_epi32(sum, a, b);
#else
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
    }
};

#if defined(__AVX512BW__)
template <>
struct Integers<64> {
    typedef __m512i Vector;
    typedef __m512 Floats;
    static Floats to_float(Vector x) { return _mm512_cvtepi32_ps(x); }
    static Vector load(const void* p) { return _mm512_loadu_si512(p); }
    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector splat32(int32_t x) { return _mm512_set1_epi32(x); }
    static Vector unpack_low8(Vector a, Vector b) { return _mm512_unpacklo_epi8(a, b); }
    static Vector unpack_high8(Vector a, Vector b) { return _mm512_unpackhi_epi8(a, b); }
    static Vector multiply_high(Vector a, Vector b) { return _mm512_mulhrs_epi16(a, b); }
    static Vector add16(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
    static Vector subtract16(Vector a, Vector b) { return _mm512_sub_epi16(a, b); }
    static Vector flip_signs8(Vector a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }
    static Vector dot(Vector sum, Vector a, Vector b) {
#if defined(__AVX512VNNI__)
        return _mm512_dpwssd_epi32(sum, a, b);
#else
        return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
    }
};
#endif

// Where unpacking `Bytes` int8 with zeros puts dim `dim`, as an index of the int16: the first vector holds the lower 8
// of every 16.
template <int Bytes>
constexpr int64_t unpacked(int64_t dim) {
    const int64_t first = dim / Bytes * Bytes, at = dim % Bytes;
    return first + at % 16 / 8 * (Bytes / 2) + at / 16 * 8 + at % 8;
}

// Rounds to int16, to nearest even.
inline void store_int16(int16_t* to, vf x) {
#if defined(__AVX512BW__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
#else
    const __m256i whole = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#endif
}

// The same to a row in the order of `unpacked`, for dims `dim` on.
template <int Bytes>
inline void store_unpacked(int16_t* row, int64_t dim, vf x) {
    int16_t rounded[kLanes];
    store_int16(rounded, x);
    for (int i = 0; i < kLanes; i += 8) std::memcpy(row + unpacked<Bytes>(dim + i), rounded + i, 8 * sizeof *row);
}

// Which dim is lane `lane` of sum `n` (of four) of `Bytes` values in pairs of keys, unpacked twice.
template <int Bytes>
constexpr int64_t summed_dim(int n, int lane) {
    return lane / 4 * 16 + n * 4 + lane % 4;
}

// Columns from the order of `summed_dim` to that of the dims.
template <int Bytes>
inline void in_order_of_dims(float* columns, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; c += Bytes) {
        float dims[Bytes];
        for (int n = 0; n < 4; ++n)
            for (int lane = 0; lane < Bytes / 4; ++lane)
                dims[summed_dim<Bytes>(n, lane)] = columns[c + n * (Bytes / 4) + lane];
        std::memcpy(columns + c, dims, sizeof dims);
    }
}

// Rows to ask for while scores are formed: the block's values, and half of each of the next block's keys. The other
// half is asked for while values are added, which takes half as long.
struct Ahead {
    const void* const* values = nullptr;
    const void* const* keys = nullptr;
};

// Sums of products of R queries with the first `count` keys of a block: scores[r * stride + key], in fp32 times
// scale[r]. All rows are in the order of `unpacked`.
//
// table: int16[key][cos of half, sin of half]; ratios: int16[2 half]; query: int16[R][2 half].
template <int R, int Bytes, int Vectors>
__attribute__((noinline)) void score_int8(const void* const* keys, int count, const int16_t* table,
                                          const int16_t* ratios, const int16_t* query, const float* scale,
                                          float* scores, int64_t stride, Ahead ahead) {
    typedef Integers<Bytes> I;
    typedef typename I::Vector Vector;
    typedef uint32_t Sums __attribute__((vector_size(Bytes)));
    constexpr int kTogether = 2, kCount = Bytes / 4;
    constexpr int64_t kHalf = Vectors * Bytes;
    for (int first = 0; first < count; first += kCount) {
        Sums sums[R][kCount];
        const int here = count - first < kCount ? count - first : kCount;
        for (int k = 0; k < kCount; k += kTogether) {
            if (k >= here) {
                for (int r = 0; r < R; ++r)
                    for (int j = 0; j < kTogether; ++j) sums[r][k + j] = Sums{};
                continue;
            }
            Vector sum[R][kTogether];
            const int8_t* rows[kTogether];
            const int16_t* turns[kTogether];
#pragma GCC unroll 2
            for (int j = 0; j < kTogether; ++j) {
                const int key = first + (k + j < here ? k + j : k);
                rows[j] = static_cast<const int8_t*>(keys[key]);
                turns[j] = table + key * 2 * kHalf;
                if (ahead.values) {
                    prefetch_row(ahead.values[key], 0, 2 * kHalf);
                    prefetch_row(ahead.keys[key], 0, kHalf);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[r][j] = I::zero();
            }
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) {
                Vector x[kTogether], y[kTogether];
#pragma GCC unroll 2
                for (int j = 0; j < kTogether; ++j) {
                    x[j] = I::load(rows[j] + v * Bytes);
                    y[j] = I::load(rows[j] + kHalf + v * Bytes);
                }
#pragma GCC unroll 2
                for (int side = 0; side < 2; ++side) {
                    const int64_t at = v * Bytes + side * (Bytes / 2);
                    Vector a[kTogether], b[kTogether];
#pragma GCC unroll 2
                    for (int j = 0; j < kTogether; ++j) {
                        const Vector raw_x = side ? I::unpack_high8(I::zero(), x[j]) : I::unpack_low8(I::zero(), x[j]);
                        const Vector raw_y = side ? I::unpack_high8(I::zero(), y[j]) : I::unpack_low8(I::zero(), y[j]);
                        const Vector scaled_x = I::multiply_high(raw_x, I::load(ratios + at));
                        const Vector scaled_y = I::multiply_high(raw_y, I::load(ratios + kHalf + at));
                        const Vector c = I::load(turns[j] + at), s = I::load(turns[j] + kHalf + at);
                        a[j] = I::subtract16(I::multiply_high(scaled_x, c), I::multiply_high(scaled_y, s));
                        b[j] = I::add16(I::multiply_high(scaled_y, c), I::multiply_high(scaled_x, s));
                    }
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const Vector first_half = I::load(query + r * 2 * kHalf + at);
                        const Vector second_half = I::load(query + r * 2 * kHalf + kHalf + at);
#pragma GCC unroll 2
                        for (int j = 0; j < kTogether; ++j)
                            sum[r][j] = I::dot(I::dot(sum[r][j], a[j], first_half), b[j], second_half);
                    }
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int j = 0; j < kTogether; ++j) sums[r][k + j] = (Sums)sum[r][j];
        }
        for (int r = 0; r < R; ++r)
            store(scores + r * stride + first, I::to_float((Vector)lane_sums(sums[r])) * scale[r]);
    }
}

// Adds the values of `count` keys, weighted, to R rows of sums: out[r * stride + c]. Of every `Bytes` columns, in the
// order of `summed_dim`.
//
// weights: int16[R][weight_stride], zeros from `count` to an even number; scale: of a product, per row.
template <int R, int Bytes>
__attribute__((noinline)) void add_int8(const void* const* values, int count, int64_t head_dim, const int16_t* weights,
                                        int64_t weight_stride, const float* scale, float* out, int64_t stride,
                                        const void* const* ahead) {
    typedef Integers<Bytes> I;
    typedef typename I::Vector Vector;
    constexpr int kColumns = 4, kLanesOfSum = Bytes / 4;
    int32_t offset[R];
    for (int r = 0; r < R; ++r) {
        int32_t total = 0;
        for (int k = 0; k < count; ++k) total += weights[r * weight_stride + k];
        offset[r] = -128 * total;
    }
    for (int64_t c = 0; c < head_dim; c += Bytes) {
        Vector sum[R][kColumns];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < kColumns; ++n) sum[r][n] = I::splat32(offset[r]);
        for (int k = 0; k < count; k += 2) {
            const int other = k + 1 < count ? k + 1 : k;  // its weight is 0
            if (ahead && c == 0) {
                prefetch_row(ahead[k], head_dim / 2, head_dim);
                prefetch_row(ahead[other], head_dim / 2, head_dim);
            }
            const Vector x = I::flip_signs8(I::load(static_cast<const int8_t*>(values[k]) + c));
            const Vector y = I::flip_signs8(I::load(static_cast<const int8_t*>(values[other]) + c));
            const Vector low = I::unpack_low8(x, y), high = I::unpack_high8(x, y);
            const Vector pairs[kColumns] = {I::unpack_low8(low, I::zero()), I::unpack_high8(low, I::zero()),
                                            I::unpack_low8(high, I::zero()), I::unpack_high8(high, I::zero())};
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                int32_t both;
                std::memcpy(&both, weights + r * weight_stride + k, sizeof both);
                const Vector weight = I::splat32(both);
#pragma GCC unroll 4
                for (int n = 0; n < kColumns; ++n) sum[r][n] = I::dot(sum[r][n], pairs[n], weight);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < kColumns; ++n) {
                float* to = out + r * stride + c + n * kLanesOfSum;
                store(to, load<typename I::Floats>(to) + I::to_float(sum[r][n]) * scale[r]);
            }
    }
}

#endif

}  // namespace
}  // namespace longrope
