// Between fp32 and the 16-bit formats, to nearest even, in integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cuda/types.cuh"

namespace longrope::emulator {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(float x) {
    return x;
}
inline float widen(BFloat16Bits x) {
    return float_of(uint32_t{x.bits} << 16);
}
inline float widen(Half x) {
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
    return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

template <class T>
uint16_t narrow(float x);
template <>
inline uint16_t narrow<BFloat16Bits>(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
template <>
inline uint16_t narrow<Half>(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 rounds to infinity
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the spacing is 2^-24: adding 0.5, whose spacing in fp32 is 2^-24, rounds there.
        const float rounded = float_of(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(rounded) - bits_of(0.5f)));
    }
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13));
}

// x y + z of fp16 numbers so that rounding it to fp16 rounds once: in fp32, the last bit set where bits were lost.
inline float multiply_add_odd(float x, float y, float z) {
    const double exact = double{x} * y + z;  // of 22 bits and 11, at most 2^-48 and 2^32: lost is far below fp16's half
    const float near = static_cast<float>(exact);
    if (std::isnan(exact) || near == exact || std::isinf(near)) return near;
    const bool outwards = (near > exact) == (exact > 0.0);
    const uint32_t towards_zero = bits_of(near) - outwards;
    return float_of(towards_zero | 1u);
}

template <class T>
Float2 unpack(uint32_t both) {
    return {widen(T{static_cast<uint16_t>(both)}), widen(T{static_cast<uint16_t>(both >> 16)})};
}

}  // namespace longrope::emulator
