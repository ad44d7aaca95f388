// Every instruction that the kernels use beyond plain C++, under a name a person can say.
//
// Compiled by nvcc, a name is one PTX instruction (primitives_ptx.cuh). Compiled by a host compiler, it is the
// emulator's version of that instruction (csrc/emulator/primitives.h), which checks what hardware leaves undefined.
//
// Shared memory is addressed by bytes from its start, as PTX does, and reached through these functions alone; so is
// global memory. `T` is the operands' type, Half or BFloat16; two of them travel in a uint32_t, the first in the low
// half.
//
//   thread_index block_index block_count lane_index warp_index
//   multiprocessor_count multiprocessor_shared
//                                of the current device, on the host; the latter in bytes
//   load_global<V> store_global  V of 1 to 16 bytes, aligned to its size
//   load_shared<V> store_shared  likewise
//   copy_async<N>                cp.async: N = 4, 8 or 16 bytes, or zeros where not valid
//   copy_async_commit copy_async_wait<N>
//                                wait until at most N groups are in flight; a barrier then shows them to others
//   block_sync warp_sync         bar.sync 0; __syncwarp
//   named_sync named_arrive      bar.sync / bar.arrive id, threads
//   shuffle_xor shuffle any_lane of the whole warp
//   load_matrices load_matrices_transposed
//                                ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8
//   multiply_add<T>              mma.m16n8k16: d[4] += a[4] b[2], fp32 accumulators
//   exp2_fast                    ex2.approx.ftz, 2 ulp
//   divide_fast                  by rcp.approx.ftz, 2 ulp; exact in Hopper's own kernels
//   anew                         its argument; what is made of it is made here and not kept in registers from before
//   pack<T> unpack<T>            two T in a word
//   subtract<T>                  of two T in a word each, to nearest even
//   multiply_halves multiply_add_halves negate_halves
//                                of two fp16 in a word each: x y; x y + z rounded once; -x
//   permute                      four of the bytes of two words, of which the first has bytes 0 to 3 and the second 4
//                                to 7: byte i of the result is byte selector >> 4 i & 7
//   as_float as_bits             of these bits; the bits of a float
//   widen narrow                 between fp32 and T, to nearest even
//   widen_fp8 narrow_fp8         the two fp8 of a low half as two Half, exact; two fp32 as two fp8, to nearest even, at
//                                most 448 in magnitude; NaN stays NaN
//
// Hopper (sm_90a) besides:
//   mbarrier_init                arrivals that end a phase
//   mbarrier_arrive mbarrier_expect
//                                one arrival; the same with bytes that bulk copies are still to bring in this phase
//   mbarrier_wait                try_wait.parity until the phase of that parity is over
//   proxy_fence                  what the thread wrote to shared memory becomes visible to bulk copies and wgmma
//   tensor_map copy_tensor       cp.async.bulk.tensor: a box of a tensor of 16-bit elements, zeros where it ends; the
//                                map is made on the host and passed to the kernel by value
//   matrix_descriptor advance    of wgmma operands in shared memory: start, leading and stride byte offsets, swizzle
//   group_multiply_add<T, transposed>
//                                wgmma.m64nNk16 of a warpgroup: d = a b (+ d), a in registers or shared memory, b in
//                                shared memory, k contiguous or, transposed, n; d[j][c] is row 16 (warp % 4) + lane / 4
//                                + 8 (c / 2) and column 8 j + 2 (lane % 4) + c % 2
//   group_fence group_commit     wgmma.fence before products of registers that others wrote; wgmma.commit_group
//   group_wait<N>                wait until at most N groups are in flight; names the registers that may be used then
//   grow_registers<N> shrink_registers<N>
//                                setmaxnreg, by all warps of a warpgroup
#pragma once

#include "types.cuh"

#if defined(__CUDACC__)
#include "primitives_ptx.cuh"
#else
#include "../emulator/primitives.h"
#endif

namespace longrope {

// The same matrix from `bytes` further on.
LONGROPE_DEVICE MatrixDescriptor advance(MatrixDescriptor descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

}  // namespace longrope
