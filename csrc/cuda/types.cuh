// The types that primitives take and give, the same on device and host.
#pragma once

#include <cstdint>

namespace longrope {

struct Half {
    uint16_t bits;
};
struct BFloat16Bits {
    uint16_t bits;
};

struct Fp8 {
    uint8_t bits;  // e4m3, core/fp8.h
};

using SharedAddress = uint32_t;  // bytes from the start of the block's shared memory

struct alignas(16) Vec16 {
    uint32_t word[4];
};
struct alignas(8) Vec8 {
    uint32_t word[2];
};
struct alignas(8) Float2 {
    float x, y;
};
struct alignas(16) Float4 {
    float at[4];
};

// The bits that stand for a swizzle in a matrix descriptor; the number is bytes of a row.
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

constexpr int kMaxTensorRank = 5;

// A tensor of 16-bit elements in global memory, the contiguous dimension first, and the box of it that one copy brings.
struct TensorShape {
    const void* data;  // aligned to 16 bytes
    int32_t rank;
    Swizzle swizzle;                            // of rows of box[0] elements
    uint32_t size[kMaxTensorRank];              // elements
    uint32_t box[kMaxTensorRank];               // elements
    uint64_t stride_bytes[kMaxTensorRank - 1];  // of dimensions 1 and on, multiples of 16

    uint32_t box_bytes() const {
        uint32_t bytes = 2;
        for (int i = 0; i < rank; ++i) bytes *= box[i];
        return bytes;
    }
};

// Opaque, made by `tensor_map`.
struct alignas(64) TensorMap {
    uint64_t word[16];
};

using MatrixDescriptor = uint64_t;

}  // namespace longrope
