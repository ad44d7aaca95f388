// The angle of a rotary pair as a 32-bit fraction of a turn, and its cosine and sine.
//
// A frequency is a 64-bit fixed-point fraction of a turn, so the angle at position p is the upper half of the product
// p * F mod 2^64: reduction modulo a turn is the overflow of an unsigned multiplication. The angle is exact to 2^-31
// turn for p < 2^31. One octant-reduced polynomial gives cos and sin; both are within 1.2e-7 of the exact value of that
// angle.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace longrope {

struct CosSin {
    float cos, sin;
};

// The angle of position p, in units of 2^-32 turn. Positions may be negative (padding rows): the product wraps alike.
LONGROPE_HOST_DEVICE inline int32_t phase_of(int64_t position, int64_t turns) {
    return static_cast<int32_t>((static_cast<uint64_t>(position) * static_cast<uint64_t>(turns)) >> 32);
}

// Branch-free, so that a loop over pairs vectorises.
LONGROPE_HOST_DEVICE inline CosSin cos_sin(int32_t phase) {
    const uint32_t shifted = static_cast<uint32_t>(phase) + 0x20000000u;
    const uint32_t quadrant = shifted >> 30;
    const int32_t rest = static_cast<int32_t>(static_cast<uint32_t>(phase) - (quadrant << 30));
    const float x = static_cast<float>(rest) * 1.46291807926715968e-9f;  // 2 pi / 2^32, x in [-pi/4, pi/4]
    const float x2 = x * x;
    const float sine =
        x + x * x2 * (-0.16666650669203337f + x2 * (0.008331978658137475f + x2 * -0.000194956356072684f));
    const float cosine =
        1.0f +
        x2 * (-0.5f + x2 * (0.04166664686633811f + x2 * (-0.0013887367510479265f + x2 * 2.4438450974851804e-5f)));
    const bool swap = quadrant & 1u;
    const float c = swap ? sine : cosine;
    const float s = swap ? cosine : sine;
    return {((quadrant + 1u) & 2u) ? -c : c, (quadrant & 2u) ? -s : s};
}

}  // namespace longrope
