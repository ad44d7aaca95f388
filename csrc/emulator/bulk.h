// What mbarriers and tensor maps are to the emulator (PTX ISA, "mbarrier" and "Tensor Copies").
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../cuda/types.cuh"
#include "shared_memory.h"

namespace longrope::emulator {

// An mbarrier: a phase is over when all arrivals have come and the bytes expected by then have been copied.
struct MemoryBarrier {
    uint32_t address;
    int arrivals;  // of a phase
    int pending;   // arrivals that are still to come
    int64_t bytes = 0;
    uint32_t phase = 0;                             // that is not over
    Clock joined;                                   // of those that arrived, and of the copies
    Clock completed;                                // the same when the last phase was over
    std::vector<std::pair<int, uint32_t>> waiting;  // threads, and the parity of the phase that each waits for
};

// A bulk copy that was issued and has not landed.
struct TensorCopy {
    TensorShape shape;
    uint32_t to;
    int32_t at[kMaxTensorRank];
    int barrier, thread;
    Site site;
};

// Where the swizzle puts a byte of shared memory: the place of a 16-byte chunk within its row is permuted by the row's
// place in a pattern of 8, 4 or 2 runs of 128 bytes.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    const uint32_t mask = swizzle == Swizzle::k128 ? 7 : swizzle == Swizzle::k64 ? 3 : swizzle == Swizzle::k32 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}

// Bytes of a row of a swizzled tile, 16 without swizzle.
inline uint32_t swizzle_bytes(Swizzle swizzle) {
    return swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 16;
}

static_assert(sizeof(TensorShape) <= sizeof(TensorMap), "the emulator keeps the shape itself in the map");

inline TensorShape shape_of(const TensorMap& map) {
    TensorShape shape;
    std::memcpy(&shape, &map, sizeof shape);
    return shape;
}

// What cuTensorMapEncodeTiled refuses, and what the emulator does not model; empty: nothing.
const char* refusal(const TensorShape& shape);

}  // namespace longrope::emulator
