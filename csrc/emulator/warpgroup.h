// Products of warpgroups (wgmma), as each warp sees them: issued, committed in groups, and done when waited for.
//
// Registers that a product will write hold a NaN from its issue to the wait: who reads them early computes with it, who
// writes them is told. A warp takes its own 16 of the 64 rows; what it reads of shared memory is being read until its
// own wait.
#pragma once

#include <cstdint>
#include <vector>

#include "../cuda/types.cuh"
#include "shared_memory.h"

namespace longrope::emulator {

constexpr int kGroupWarps = 4, kGroupRows = 64, kDepth = 16;

// A matrix descriptor's matrix: `rows` (m or n) by 16 (k) elements of 16 bits (PTX ISA, "Asynchronous Warpgroup Level
// Matrix Shared Memory Layout").
struct SharedMatrix {
    MatrixDescriptor descriptor;
    int rows;
    bool transposed;  // rows are contiguous ("MN-major"), not k

    // Address of the 16 bytes that hold 8 elements from (row, k) on, along k or, transposed, along the rows.
    uint32_t chunk(int row, int k) const;
    // Throws where the descriptor is none that the hardware takes.
    void check(Site site) const;
    template <class Visit>
    void each_chunk(const Visit& visit) const {
        for (int row = 0; row < rows; row += transposed ? 8 : 1)
            for (int k = 0; k < kDepth; k += transposed ? 1 : 8) visit(row, k, chunk(row, k));
    }
};

// What one lane gives to a product.
struct LaneProduct {
    float* d;
    const uint32_t* a;  // null: A is in shared memory
};

struct GroupProduct {
    int columns;
    bool accumulate;
    SharedMatrix left, right;  // left is unused where A is in registers
    float (*widen)(uint16_t);
    Site site;
    LaneProduct lanes[kLanes];
    uint32_t a[kLanes][4];  // A as it was at the issue
};

// What the registers of an accumulator in flight will hold.
struct Accumulator {
    float* d[kLanes];
    int columns;
    int products;              // in flight
    std::vector<float> value;  // [lane][columns / 2]
};

struct WarpProducts {
    std::vector<std::vector<GroupProduct>> groups;  // committed, oldest first; the last is open
    std::vector<Accumulator> accumulators;
    bool fenced = false;  // nothing landed since the last fence
    size_t issued = 0;
};

// What the warps of a warpgroup must issue alike.
struct Issue {
    Site site;
    MatrixDescriptor left, right;
};

}  // namespace longrope::emulator
