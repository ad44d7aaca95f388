// Which tiles of rows a block of a persistent grid works on, and in which order: no counter in memory, the same in
// every run.
//
// Tiles are sorted by sections of (sequence, key head) pairs whose keys and values together stay in L2, and within a
// section by the keys they see under a causal mask, most first. Rounds deal them to the blocks there and back, so that
// whoever gets the longest of one round gets the shortest of the next: the work of two blocks differs by less than one
// tile a section.
#pragma once

#include <cstdint>

#include "../core/host_device.h"

namespace longrope {

struct Schedule {
    int32_t pairs;       // sequences times key heads
    int32_t row_blocks;  // of the longest sequence; times pairs below 2^30
    int32_t section;     // pairs of a section

    // Place `place` of the order: the pair and its block of rows.
    struct Place {
        int32_t pair, row_block;
    };

    LONGROPE_HOST_DEVICE int32_t tiles() const { return pairs * row_blocks; }

    // The tile of a block in a round, from tiles() on: none, now and in all later rounds.
    LONGROPE_HOST_DEVICE static int32_t dealt(int32_t round, int32_t block, int32_t blocks) {
        return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    }

    LONGROPE_HOST_DEVICE Place at(int32_t tile) const {
        const int32_t first = tile / (section * row_blocks) * section;
        const int32_t here = pairs - first < section ? pairs - first : section;
        const int32_t rest = tile - first * row_blocks;
        return {first + rest % here, row_blocks - 1 - rest / here};
    }
};

}  // namespace longrope
