// primitives.cuh on the device: one PTX instruction a name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../core/fp8.h"
#include "primitives.cuh"

#define LONGROPE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// Registers for so many blocks on a multiprocessor.
#define LONGROPE_RESIDENT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LONGROPE_DEVICE __device__ __forceinline__
#define LONGROPE_GRID_CONSTANT __grid_constant__

namespace longrope {

using Stream = cudaStream_t;

LONGROPE_DEVICE int thread_index() {
    return threadIdx.x;
}
LONGROPE_DEVICE int64_t block_index() {
    return blockIdx.x;
}
LONGROPE_DEVICE int64_t block_count() {
    return gridDim.x;
}
LONGROPE_DEVICE int lane_index() {
    return threadIdx.x % 32;
}
LONGROPE_DEVICE int warp_index() {
    return threadIdx.x / 32;
}

template <class V>
LONGROPE_DEVICE V load_global(const V* from) {
    return *from;
}
template <>
LONGROPE_DEVICE Vec16 load_global<Vec16>(const Vec16* from) {
    Vec16 v;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(from));
    return v;
}
template <class V>
LONGROPE_DEVICE void store_global(V* to, const V& value) {
    *to = value;
}

extern __shared__ __align__(1024) uint8_t longrope_shared[];

template <class V>
LONGROPE_DEVICE V load_shared(SharedAddress from) {
    return *reinterpret_cast<const V*>(longrope_shared + from);
}
template <class V>
LONGROPE_DEVICE void store_shared(SharedAddress to, const V& value) {
    *reinterpret_cast<V*>(longrope_shared + to) = value;
}

LONGROPE_DEVICE uint32_t shared_window(SharedAddress address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(longrope_shared)) + address;
}

template <int kBytes>
LONGROPE_DEVICE void copy_async(SharedAddress to, const void* from, bool valid) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_window(to)), "l"(from),
                     "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_window(to)), "l"(from), "n"(kBytes),
                     "r"(valid ? kBytes : 0)
                     : "memory");
}
LONGROPE_DEVICE void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
LONGROPE_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

LONGROPE_DEVICE void block_sync() {
    __syncthreads();
}
LONGROPE_DEVICE void warp_sync() {
    __syncwarp();
}
LONGROPE_DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LONGROPE_DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

LONGROPE_DEVICE float shuffle_xor(float value, int lane_mask) {
    return __shfl_xor_sync(~0u, value, lane_mask);
}
LONGROPE_DEVICE float shuffle(float value, int lane) {
    return __shfl_sync(~0u, value, lane);
}
LONGROPE_DEVICE bool any_lane(bool value) {
    return __any_sync(~0u, value);
}

LONGROPE_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_window(row))
                 : "memory");
}
LONGROPE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_window(row))
                 : "memory");
}

template <class T>
LONGROPE_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define LONGROPE_MMA(T, type)                                                                             \
    template <>                                                                                           \
    LONGROPE_DEVICE void multiply_add<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                        \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
    }
LONGROPE_MMA(BFloat16Bits, "bf16")
LONGROPE_MMA(Half, "f16")
#undef LONGROPE_MMA

LONGROPE_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

LONGROPE_DEVICE float divide_fast(float x, float by) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    return x /
           by;  // those kernels use every register: with the fast one ptxas 13.0 spills in them, without it in sm_80's
#else
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(by));
    return x * inverse;
#endif
}

LONGROPE_DEVICE uint32_t anew(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
LONGROPE_DEVICE const uint8_t* anew(const uint8_t* x) {
    asm volatile("" : "+l"(x));
    return x;
}

template <class T>
LONGROPE_DEVICE uint32_t pack(float low, float high);
template <>
LONGROPE_DEVICE uint32_t pack<BFloat16Bits>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
LONGROPE_DEVICE uint32_t pack<Half>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <class T>
LONGROPE_DEVICE uint32_t subtract(uint32_t x, uint32_t y);
template <>
LONGROPE_DEVICE uint32_t subtract<Half>(uint32_t x, uint32_t y) {
    uint32_t difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(x), "r"(y));
    return difference;
}
template <>
LONGROPE_DEVICE uint32_t subtract<BFloat16Bits>(uint32_t x, uint32_t y) {
    uint32_t difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(y), "r"(0xbf80bf80u), "r"(x));  // sm_80 has no other
    return difference;
}
LONGROPE_DEVICE uint32_t multiply_halves(uint32_t x, uint32_t y) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
    return product;
}
LONGROPE_DEVICE uint32_t multiply_add_halves(uint32_t x, uint32_t y, uint32_t z) {
    uint32_t sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(y), "r"(z));
    return sum;
}
LONGROPE_DEVICE uint32_t negate_halves(uint32_t x) {
    uint32_t negative;
    asm("neg.f16x2 %0, %1;" : "=r"(negative) : "r"(x));
    return negative;
}
LONGROPE_DEVICE uint32_t permute(uint32_t first, uint32_t second, uint32_t selector) {
    return __byte_perm(first, second, selector);
}
LONGROPE_DEVICE float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
LONGROPE_DEVICE uint32_t as_bits(float x) {
    return __float_as_uint(x);
}

template <class T>
LONGROPE_DEVICE float widen(T x);
template <>
LONGROPE_DEVICE float widen<float>(float x) {
    return x;
}
template <>
LONGROPE_DEVICE float widen<BFloat16Bits>(BFloat16Bits x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
}
template <>
LONGROPE_DEVICE float widen<Half>(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T>
LONGROPE_DEVICE T narrow(float x) {
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f) & 0xffffu)};
}
template <>
LONGROPE_DEVICE float narrow<float>(float x) {
    return x;
}

template <class T>
LONGROPE_DEVICE Float2 unpack(uint32_t both) {
    return {widen(T{static_cast<uint16_t>(both & 0xffffu)}), widen(T{static_cast<uint16_t>(both >> 16)})};
}

LONGROPE_DEVICE uint32_t widen_fp8(uint32_t both) {
    uint32_t halves;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(both)));
#else
    asm("mul.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(fp8_as_halves(both)), "r"(0x5c005c00u));  // 2^8
#endif
    return halves;
}
LONGROPE_DEVICE uint32_t narrow_fp8(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
#else
    return fp8_of(low) | fp8_of(high) << 8;
#endif
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int multiprocessor_shared() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "the current device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "the shared memory of a multiprocessor");
    return bytes;
}

// Runs `kernel` on `blocks` blocks; none for 0.
template <class Kernel, class Params>
void launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, const Params& params, Stream stream) {
    if (blocks == 0) return;
    if (blocks > INT32_MAX) throw std::runtime_error("a launch of more than 2^31 - 1 blocks");
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
              "shared memory of a kernel");
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
    check(cudaGetLastError(), "launch of a kernel");
}

}  // namespace longrope

#include "primitives_hopper_ptx.cuh"
