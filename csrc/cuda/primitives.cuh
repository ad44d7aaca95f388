// Every instruction that the kernels use beyond plain C++, under a name a person can say.
//
// Compiled by nvcc, a name is one PTX instruction (primitives_ptx.cuh). Compiled by a host compiler, it is the
// emulator's version of that instruction (csrc/emulator/primitives.h), which checks what hardware leaves undefined.
//
// Shared memory is addressed by bytes from its start, as PTX does, and reached through these functions alone; so is
// global memory. `T` is the operands' type, Half or BFloat16; two of them travel in a uint32_t, the first in the low
// half.
//
//   thread_index block_index lane_index warp_index block_threads
//   load_global<V> store_global            V of 1 to 16 bytes, aligned to its size
//   load_shared<V> store_shared            likewise
//   copy_async<N>                          cp.async: N = 4, 8 or 16 bytes, or zeros where not valid
//   copy_async_commit copy_async_wait<N>   wait until at most N groups are in flight; a barrier then shows them to
//   others block_sync warp_sync                   bar.sync 0; __syncwarp named_sync named_arrive bar.sync / bar.arrive
//   id, threads shuffle_xor shuffle any_lane           of the whole warp load_matrices load_matrices_transposed
//   ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8 multiply_add<T> mma.m16n8k16: d[4] += a[4] b[2],
//   fp32 accumulators exp2_fast                              ex2.approx.ftz, 2 ulp pack<T> unpack<T> widen narrow
//   between fp32 and T, to nearest even
#pragma once

#include <cstdint>

namespace longrope {

struct Half {
    uint16_t bits;
};
struct BFloat16Bits {
    uint16_t bits;
};

using SharedAddress = uint32_t;  // bytes from the start of the block's shared memory

struct alignas(16) Vec16 {
    uint32_t word[4];
};
struct alignas(8) Vec8 {
    uint32_t word[2];
};
struct Float2 {
    float x, y;
};

}  // namespace longrope

#if defined(__CUDACC__)
#include "primitives_ptx.cuh"
#else
#include "../emulator/primitives.h"
#endif
