// primitives.cuh on the host: each instruction as PTX defines it, on the Machine's threads and memories.
//
// Fragments, by lane l with group g = l / 4 and place t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a[i], two elements e: row g + 8 (i % 2), column 2 t + e + 8 (i / 2)
//   b[i], two elements e: row 2 t + e + 8 i, column g
//   d[i]:                 row g + 8 (i / 2), column 2 t + i % 2
//   ldmatrix register i:  elements 2 t, 2 t + 1 of row g of matrix i; transposed: of column g
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../core/fp8.h"
#include "../cuda/primitives.cuh"
#include "convert.h"
#include "machine.h"

#define LONGROPE_KERNEL(threads) void
#define LONGROPE_RESIDENT_KERNEL(threads, blocks) void
#define LONGROPE_DEVICE inline
#define LONGROPE_GRID_CONSTANT

namespace longrope {

using Stream = void*;
using emulator::kLanes;
using emulator::Machine;
using emulator::Site;

inline int thread_index() {
    return Machine::get().thread();
}
inline int64_t block_index() {
    return Machine::get().block();
}
inline int64_t block_count() {
    return Machine::get().blocks();
}
inline int lane_index() {
    return thread_index() % kLanes;
}
inline int warp_index() {
    return thread_index() / kLanes;
}

template <class V>
V load_global(const V* from, Site site = Site::here()) {
    Machine::get().global.check(from, sizeof(V), false, site);
    V value;
    std::memcpy(static_cast<void*>(&value), from, sizeof(V));
    return value;
}
template <class V>
void store_global(V* to, const V& value, Site site = Site::here()) {
    Machine::get().global.check(to, sizeof(V), true, site);
    std::memcpy(static_cast<void*>(to), &value, sizeof(V));
}

template <class V>
V load_shared(SharedAddress from, Site site = Site::here()) {
    return Machine::get().read_shared<V>(from, site);
}
template <class V>
void store_shared(SharedAddress to, const V& value, Site site = Site::here()) {
    Machine::get().write_shared(to, value, site);
}

template <int kBytes>
void copy_async(SharedAddress to, const void* from, bool valid, Site site = Site::here()) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async takes 4, 8 or 16 bytes");
    Machine::get().copy_async(to, from, kBytes, valid, site);
}
inline void copy_async_commit() {
    Machine::get().copy_commit();
}
template <int kPending>
void copy_async_wait(Site site = Site::here()) {
    Machine::get().copy_wait(kPending, site);
}

inline void block_sync(Site site = Site::here()) {
    Machine::get().barrier(0, Machine::get().threads(), true, site);
}
inline void warp_sync(Site site = Site::here()) {
    Machine::get().warp_sync(site);
}
inline void named_sync(int id, int threads, Site site = Site::here()) {
    Machine::get().barrier(id, threads, true, site);
}
inline void named_arrive(int id, int threads, Site site = Site::here()) {
    Machine::get().barrier(id, threads, false, site);
}

namespace emulator {

// What a lane gives to a shuffle or vote, and what it gets.
template <class V>
struct Exchange {
    V value, result;
    int source;
};

template <class V>
V exchange(const char* name, V value, int source, Site site) {
    Exchange<V> slot{value, value, source};
    Machine::get().collective(name, 0, ~0u, false, slot, site, [](Exchange<V>** lanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l]->result = lanes[lanes[l]->source & (kLanes - 1)]->value;
    });
    return slot.result;
}

struct MatrixLoad {
    SharedAddress row;
    uint32_t* registers;
};

inline void load_matrices(uint32_t (&r)[4], SharedAddress row, bool transposed, Site site) {
    MatrixLoad slot{row, r};
    Machine& machine = Machine::get();
    machine.collective("ldmatrix", transposed, ~0u, true, slot, site, [&](MatrixLoad** lanes) {
        const int first = machine.thread() / kLanes * kLanes;
        ++machine.counters.matrix_loads;
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t element[8][8];
            uint32_t banks = 0;  // of 16 bytes
            for (int i = 0; i < 8; ++i) {
                const SharedAddress address = lanes[8 * matrix + i]->row;
                std::memcpy(element[i], machine.read_shared(first + 8 * matrix + i, address, 16, site), 16);
                machine.counters.bank_conflicts += banks >> (address / 16 % 8) & 1;
                banks |= 1u << (address / 16 % 8);
            }
            for (int l = 0; l < kLanes; ++l) {
                const int g = l / 4, t = 2 * (l % 4);
                const uint32_t low = transposed ? element[t][g] : element[g][t];
                const uint32_t high = transposed ? element[t + 1][g] : element[g][t + 1];
                lanes[l]->registers[matrix] = low | high << 16;
            }
        }
    });
}

struct Product {
    float* d;
    const uint32_t *a, *b;
};

}  // namespace emulator

inline float shuffle_xor(float value, int lane_mask, Site site = Site::here()) {
    return emulator::exchange("shuffle_xor", value, lane_index() ^ lane_mask, site);
}
inline float shuffle(float value, int lane, Site site = Site::here()) {
    return emulator::exchange("shuffle", value, lane, site);
}
inline bool any_lane(bool value, Site site = Site::here()) {
    emulator::Exchange<bool> slot{value, false, 0};
    Machine::get().collective("vote", 0, ~0u, false, slot, site, [](emulator::Exchange<bool>** lanes) {
        bool any = false;
        for (int l = 0; l < kLanes; ++l) any |= lanes[l]->value;
        for (int l = 0; l < kLanes; ++l) lanes[l]->result = any;
    });
    return slot.result;
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row, Site site = Site::here()) {
    emulator::load_matrices(r, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row, Site site = Site::here()) {
    emulator::load_matrices(r, row, true, site);
}

// Products are exact in fp32 and added in the order of k; hardware adds groups of them with a few more bits.
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
    emulator::Product slot{d, a, b};
    Machine& machine = Machine::get();
    machine.collective("mma", 0, ~0u, true, slot, site, [&](emulator::Product** lanes) {
        ++machine.counters.products;
        float left[16][16], right[16][8], sum[16][8];
        for (int l = 0; l < kLanes; ++l) {
            const int g = l / 4, t = 2 * (l % 4);
            for (int i = 0; i < 4; ++i) {
                const Float2 pair = emulator::unpack<T>(lanes[l]->a[i]);
                float* to = &left[g + 8 * (i % 2)][t + 8 * (i / 2)];
                to[0] = pair.x;
                to[1] = pair.y;
            }
            for (int i = 0; i < 2; ++i) {
                const Float2 pair = emulator::unpack<T>(lanes[l]->b[i]);
                right[t + 8 * i][g] = pair.x;
                right[t + 8 * i + 1][g] = pair.y;
            }
            for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][t + i % 2] = lanes[l]->d[i];
        }
        for (int m = 0; m < 16; ++m)
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
        for (int l = 0; l < kLanes; ++l) {
            const int g = l / 4, t = 2 * (l % 4);
            for (int i = 0; i < 4; ++i) lanes[l]->d[i] = sum[g + 8 * (i / 2)][t + i % 2];
        }
    });
}

inline float exp2_fast(float x) {
    const float y = std::exp2(x < -126.0f ? (x < -150.0f ? -INFINITY : x) : x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

inline float divide_fast(float x, float by) {
    return x / by;
}

inline uint32_t anew(uint32_t x) {
    return x;
}
inline const uint8_t* anew(const uint8_t* x) {
    return x;
}

template <class T>
uint32_t pack(float low, float high) {
    return emulator::narrow<T>(low) | uint32_t{emulator::narrow<T>(high)} << 16;
}
template <class T>
Float2 unpack(uint32_t both) {
    return emulator::unpack<T>(both);
}
template <class T>
float widen(T x) {
    return emulator::widen(x);
}
template <class T>
T narrow(float x) {
    return T{emulator::narrow<T>(x)};
}
template <>
inline float narrow<float>(float x) {
    return x;
}

template <class T>
uint32_t subtract(uint32_t x, uint32_t y) {
    const Float2 a = emulator::unpack<T>(x), b = emulator::unpack<T>(y);
    return pack<T>(a.x - b.x, a.y - b.y);
}
inline uint32_t multiply_add_halves(uint32_t x, uint32_t y, uint32_t z) {
    const Float2 a = emulator::unpack<Half>(x), b = emulator::unpack<Half>(y), c = emulator::unpack<Half>(z);
    return pack<Half>(emulator::multiply_add_odd(a.x, b.x, c.x), emulator::multiply_add_odd(a.y, b.y, c.y));
}
inline uint32_t multiply_halves(uint32_t x, uint32_t y) {
    const Float2 a = emulator::unpack<Half>(x), b = emulator::unpack<Half>(y);
    return pack<Half>(a.x * b.x, a.y * b.y);
}
inline uint32_t negate_halves(uint32_t x) {
    return x ^ 0x80008000u;
}
inline uint32_t permute(uint32_t first, uint32_t second, uint32_t selector) {
    const uint64_t bytes = first | uint64_t{second} << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    return result;
}
inline float as_float(uint32_t bits) {
    return emulator::float_of(bits);
}
inline uint32_t as_bits(float x) {
    return emulator::bits_of(x);
}

inline uint32_t widen_fp8(uint32_t both) {
    const Float2 parts = emulator::unpack<Half>(fp8_as_halves(both));
    return pack<Half>(parts.x * 256.0f, parts.y * 256.0f);
}
inline uint32_t narrow_fp8(float low, float high) {
    return fp8_of(low) | fp8_of(high) << 8;
}

inline int multiprocessor_shared() {
    return Machine::get().multiprocessor_shared;
}

template <class Kernel, class Params>
void launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, const Params& params, Stream) {
    Machine::get().run(blocks, threads, shared_bytes, [&] { kernel(params); });
}

}  // namespace longrope

#include "primitives_hopper.h"
