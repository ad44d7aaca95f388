// fp8 as caches keep it, e4m3: a sign, 4 bits of exponent (bias 7), 3 of mantissa; 448 is the largest, there is no
// infinity, and 0x7f is NaN. Conversions in integers, for processors that have none of their own.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace longrope {

// The two fp8 of the low half of a word as two fp16, each 2^-8 of its value: exact, subnormals included; NaN stays NaN.
LONGROPE_HOST_DEVICE inline uint32_t fp8_as_halves(uint32_t both) {
    const uint32_t apart = (both & 0xffu) << 8 | (both & 0xff00u) << 16;
    const uint32_t magnitude = (apart & 0x7f007f00u) >> 1;  // in fp16's place; the biases differ by 8
    const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
    return (apart & 0x80008000u) | magnitude | (nan >> 14) * 0x7fffu;
}

// To the nearest, halves to even, at most 448 in magnitude; NaN becomes 0x7f.
LONGROPE_HOST_DEVICE inline uint32_t fp8_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fu;
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u;  // 448
    const uint32_t sign = bits >> 24 & 0x80u;
    if (magnitude < 121u << 23) {
        // Below 2^-6 steps are 2^-9, those of fp32 from 2^14 on: the addition rounds.
        float rounded;
        std::memcpy(&rounded, &magnitude, 4);
        rounded += 16384.0f;
        std::memcpy(&bits, &rounded, 4);
        return sign | (bits - 0x46800000u);
    }
    const uint32_t rebased = magnitude - (120u << 23);
    return sign | (rebased + 0x7ffffu + (rebased >> 20 & 1u)) >> 20;
}

}  // namespace longrope
