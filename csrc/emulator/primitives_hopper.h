// primitives.cuh on the host: what Hopper has besides. Included by primitives.h.
#pragma once

#include <string>

#include "bulk.h"

namespace longrope {

// Few, so that a small grid has several tiles a block.
inline int multiprocessor_count() {
    return 3;
}

inline void mbarrier_init(SharedAddress barrier, int arrivals, Site site = Site::here()) {
    Machine::get().memory_barrier_init(barrier, arrivals, site);
}
inline void mbarrier_arrive(SharedAddress barrier, Site site = Site::here()) {
    Machine::get().memory_barrier_arrive(barrier, 0, site);
}
inline void mbarrier_expect(SharedAddress barrier, int bytes, Site site = Site::here()) {
    Machine::get().memory_barrier_arrive(barrier, bytes, site);
}
inline void mbarrier_wait(SharedAddress barrier, uint32_t parity, Site site = Site::here()) {
    Machine::get().memory_barrier_wait(barrier, parity, site);
}
inline void proxy_fence() {
    Machine::get().proxy_fence();
}

inline TensorMap tensor_map(const TensorShape& shape) {
    if (const char* wanted = emulator::refusal(shape))
        throw emulator::Error(std::string("a tensor map is refused, expected ") + wanted);
    TensorMap map{};
    std::memcpy(&map, &shape, sizeof shape);
    return map;
}
template <int kRank>
void copy_tensor(SharedAddress to, const TensorMap& map, const int32_t (&at)[kRank], SharedAddress barrier,
                 Site site = Site::here()) {
    Machine::get().tensor_load(to, map, kRank, at, barrier, site);
}

inline MatrixDescriptor matrix_descriptor(SharedAddress start, uint32_t leading_bytes, uint32_t stride_bytes,
                                          Swizzle swizzle) {
    const auto field = [](uint32_t bytes) { return uint64_t{bytes & 0x3ffff} >> 4; };
    return field(start) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

namespace emulator {

template <class T>
float widen_bits(uint16_t bits) {
    return widen(T{bits});
}

template <class T, bool kTransposedA, bool kTransposedB, int kTiles>
void issue(float (&d)[kTiles][4], const uint32_t* a, MatrixDescriptor left, MatrixDescriptor right, bool accumulate,
           Site site) {
    GroupProduct product{8 * kTiles,
                         accumulate,
                         {left, kGroupRows, kTransposedA},
                         {right, 8 * kTiles, kTransposedB},
                         &widen_bits<T>,
                         site,
                         {},
                         {}};
    Machine::get().issue_product({&d[0][0], a}, product, site);
}

inline void check_landed(Site) {}
template <int kTiles, class... More>
void check_landed(Site site, float (&d)[kTiles][4], More&... more) {
    Machine::get().check_landed(&d[0][0], 4 * kTiles, site);
    check_landed(site, more...);
}
template <int kTiles, class... More>
void check_landed(Site site, uint32_t (&)[kTiles][4], More&... more) {
    check_landed(site, more...);
}

}  // namespace emulator

template <class T, bool kTransposedB = false, bool kTransposedA = false, int kTiles>
void group_multiply_add(float (&d)[kTiles][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
                        Site site = Site::here()) {
    emulator::issue<T, kTransposedA, kTransposedB>(d, nullptr, a, b, accumulate, site);
}
template <class T, bool kTransposedB = false, int kTiles>
void group_multiply_add(float (&d)[kTiles][4], const uint32_t (&a)[4], MatrixDescriptor b, bool accumulate,
                        Site site = Site::here()) {
    emulator::issue<T, false, kTransposedB>(d, a, 0, b, accumulate, site);
}
inline void group_fence(Site site = Site::here()) {
    Machine::get().group_fence(site);
}
inline void group_commit(Site site = Site::here()) {
    Machine::get().group_commit(site);
}
template <int kPending, class... Registers>
void group_wait(Registers&... landed) {
    Machine::get().group_wait(kPending, Site::here());
    emulator::check_landed(Site::here(), landed...);
}

template <int kCount>
void grow_registers(Site site = Site::here()) {
    Machine::get().set_registers(kCount, true, site);
}
template <int kCount>
void shrink_registers(Site site = Site::here()) {
    Machine::get().set_registers(kCount, false, site);
}

}  // namespace longrope
