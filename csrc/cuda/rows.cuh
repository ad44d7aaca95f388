// Rows of head_dim elements wherever they lie, read and written as fp32: whole chunks of 8, or one element.
#pragma once

#include <type_traits>

#include "primitives.cuh"

namespace longrope {

struct Float8 {
    float at[8];
};

template <class T>
LONGROPE_DEVICE Float8 unpack8(const Vec16& v) {
    Float8 x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Float2 pair = unpack<T>(v.word[i]);
        x.at[2 * i] = pair.x;
        x.at[2 * i + 1] = pair.y;
    }
    return x;
}

template <class T>
LONGROPE_DEVICE Vec16 pack8(const Float8& x) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = pack<T>(x.at[2 * i], x.at[2 * i + 1]);
    return v;
}

// What a quantised cache holds, int8_t or Fp8: its largest magnitude, a byte's value, four and eight of them, and, of
// the words (a b, c d) of two rows' bytes, the columns (a c) and (b d) as two T each. All exact.
template <class Q>
struct Quantised;

template <>
struct Quantised<int8_t> {
    static constexpr float kLargest = 127.0f;

    static LONGROPE_DEVICE float value(uint32_t byte) { return static_cast<int8_t>(byte); }
    static LONGROPE_DEVICE Float8 unpack8(const Vec8& v) {
        Float8 x;
#pragma unroll
        for (int i = 0; i < 8; ++i) x.at[i] = value(v.word[i / 4] >> (8 * (i % 4)));
        return x;
    }
    // A byte in the last place of 2^23 is a float; a conversion has a quarter of the rate.
    static LONGROPE_DEVICE Float4 unpack4(uint32_t bytes) {
        const uint32_t from_zero = bytes ^ 0x80808080u;
        Float4 x;
#pragma unroll
        for (int i = 0; i < 4; ++i) x.at[i] = as_float(permute(from_zero, 0x4b000000u, 0x7540u + i)) - 8388736.0f;
        return x;
    }
    // Four values times their scales in fp16: bytes 0 and 1, 2 and 3, or, split, 0 and 2, 1 and 3. A byte alone is an
    // fp16, (128 + x) 2^-24, exactly: one multiply-add takes it times `scales`, 2^24 of them, less 128 of them.
    static constexpr float kLargestScale = 0x1p-10f, kScaleFactor = 0x1p24f;
    static LONGROPE_DEVICE void scaled_halves(uint32_t (&halves)[2], uint32_t bytes, bool split,
                                              const uint32_t (&scales)[2]) {
        const uint32_t from_zero = bytes ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t both = permute(from_zero, 0, split ? 0x4240u + 0x101u * i : 0x4140u + 0x202u * i);
            halves[i] = multiply_add_halves(both, scales[i], multiply_halves(scales[i], 0x80808080u));  // -2^-17
        }
    }

    template <class T>
    static LONGROPE_DEVICE void widen_columns(uint32_t (&columns)[2], uint32_t rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t low = rows >> 8 * i;
            if constexpr (std::is_same_v<T, Half>)  // 1024 + (128 + x) - 1152
                columns[i] = subtract<T>(permute(rows ^ 0x80808080u, 0x64u, 0x4240u + 0x101u * i), 0x64806480u);
            else  // 128 + the low seven bits, less 128, or 256 where the eighth is set
                columns[i] = subtract<T>((low & 0x007f007fu) | 0x43004300u, (low & 0x00800080u) | 0x43004300u);
        }
    }
};

template <>
struct Quantised<Fp8> {
    static constexpr float kLargest = 448.0f;

    static LONGROPE_DEVICE float value(uint32_t byte) { return unpack<Half>(widen_fp8(byte & 0xffu)).x; }
    static LONGROPE_DEVICE Float4 unpack4(uint32_t bytes) {
        const Float2 low = unpack<Half>(widen_fp8(bytes)), high = unpack<Half>(widen_fp8(bytes >> 16));
        return {{low.x, low.y, high.x, high.y}};
    }
    static LONGROPE_DEVICE Float8 unpack8(const Vec8& v) {
        const Float4 low = unpack4(v.word[0]), high = unpack4(v.word[1]);
        return {{low.at[0], low.at[1], low.at[2], low.at[3], high.at[0], high.at[1], high.at[2], high.at[3]}};
    }
    static constexpr float kLargestScale = 0x1p4f, kScaleFactor = 1.0f;
    static LONGROPE_DEVICE void scaled_halves(uint32_t (&halves)[2], uint32_t bytes, bool split,
                                              const uint32_t (&scales)[2]) {
        const uint32_t ordered = split ? permute(bytes, 0, 0x3120u) : bytes;
#pragma unroll
        for (int i = 0; i < 2; ++i) halves[i] = multiply_halves(widen_fp8(ordered >> 16 * i), scales[i]);
    }
    template <class T>
    static LONGROPE_DEVICE void widen_columns(uint32_t (&columns)[2], uint32_t rows) {
        const uint32_t bytes = permute(rows, 0, 0x3120u);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            columns[i] = widen_fp8(bytes >> 16 * i);
            if constexpr (!std::is_same_v<T, Half>) {
                const Float2 both = unpack<Half>(columns[i]);
                columns[i] = pack<T>(both.x, both.y);
            }
        }
    }
};

// In global memory, of T.
template <class T>
struct GlobalRow {
    T* row;

    LONGROPE_DEVICE Float8 load8(int chunk) const { return unpack8<T>(load16(chunk)); }
    LONGROPE_DEVICE Vec16 load16(int chunk) const {
        return load_global(reinterpret_cast<const Vec16*>(row + chunk * 8));
    }
    LONGROPE_DEVICE void store8(int chunk, const Float8& x) const { store16(chunk, pack8<T>(x)); }
    LONGROPE_DEVICE void store16(int chunk, const Vec16& v) const {
        store_global(reinterpret_cast<Vec16*>(row + chunk * 8), v);
    }
    LONGROPE_DEVICE float load1(int dim) const { return widen(load_global(static_cast<const T*>(row + dim))); }
    LONGROPE_DEVICE void store1(int dim, float x) const { store_global(row + dim, narrow<T>(x)); }
};

// In global memory, int8_t or Fp8 with a scale per channel.
template <class Q>
struct QuantisedRow {
    const Q* row;
    const float* scale;

    LONGROPE_DEVICE Float8 load8(int chunk) const {
        Float8 x = Quantised<Q>::unpack8(load_global(reinterpret_cast<const Vec8*>(row + chunk * 8)));
#pragma unroll
        for (int i = 0; i < 8; ++i) x.at[i] *= load_global(scale + chunk * 8 + i);
        return x;
    }
    LONGROPE_DEVICE float load1(int dim) const {
        const uint8_t byte = load_global(reinterpret_cast<const uint8_t*>(row + dim));
        return Quantised<Q>::value(byte) * load_global(scale + dim);
    }
};

// Row `row` of a Tile in shared memory, of T.
template <class T, class TileT>
struct SharedRow {
    TileT tile;
    int row;

    LONGROPE_DEVICE Float8 load8(int chunk) const { return unpack8<T>(load_shared<Vec16>(tile.chunk(row, chunk))); }
    LONGROPE_DEVICE void store8(int chunk, const Float8& x) const { store_shared(tile.chunk(row, chunk), pack8<T>(x)); }
    LONGROPE_DEVICE float load1(int dim) const { return widen(load_shared<T>(tile.element(row, dim))); }
    LONGROPE_DEVICE void store1(int dim, float x) const { store_shared(tile.element(row, dim), narrow<T>(x)); }
};

// In shared memory, fp32 one after another.
struct SharedFloatRow {
    SharedAddress row;

    LONGROPE_DEVICE Float8 load8(int chunk) const {
        Float8 x;
#pragma unroll
        for (int i = 0; i < 8; ++i) x.at[i] = load1(chunk * 8 + i);
        return x;
    }
    LONGROPE_DEVICE float load1(int dim) const { return load_shared<float>(row + 4 * dim); }
    LONGROPE_DEVICE void store8(int chunk, const Float8& x) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) store1(chunk * 8 + i, x.at[i]);
    }
    LONGROPE_DEVICE void store1(int dim, float x) const { store_shared(row + 4 * dim, x); }
};

// Row `row` of a Tile of bytes in shared memory, int8_t or Fp8. `channels` says in which column a dim lies, and its
// scale.
template <class Q, class TileT, class Channels>
struct SharedQuantisedRow {
    TileT tile;
    int row;
    Channels channels;

    LONGROPE_DEVICE float load1(int dim) const {
        const int column = channels.column(dim);
        const uint32_t pair = load_shared<uint16_t>(tile.chunk(row, column / 16) + column % 16 / 2 * 2);
        return Quantised<Q>::value(pair >> (8 * (column % 2))) * channels.scale(dim);
    }
};

}  // namespace longrope
