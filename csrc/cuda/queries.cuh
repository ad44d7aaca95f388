// The queries of a block or a warpgroup, rotated, in shared memory.
#pragma once

#include "rotate.cuh"
#include "sequence.cuh"
#include "tile.cuh"

namespace longrope {

// Rotates the queries of the kThreads threads into shared memory; rows past `count` and columns past head_dim become
// zeros.
template <class T, int kThreads, class TileT>
LONGROPE_DEVICE void load_queries(const AttentionParams& p, const Sequence& s, const RowMap& map, int64_t first_row,
                                  int count, TileT tile, int thread = thread_index()) {
    const int head_dim = static_cast<int>(p.head_dim);
    rotate_rows<kThreads>(
        regime_of(p.rotation, s.b), head_dim, count, false,
        [&](int r) { return s.query_position(p, map.token(first_row + r)); },
        [&](int r) {
            const int64_t row = first_row + r;
            return GlobalRow<T>{s.query_row<T>(p.query, map.head(row), map.token(row))};
        },
        [&](int r) { return SharedRow<T, TileT>{tile, r}; }, thread);
    for (int i = thread; i < TileT::kRows * TileT::kChunks; i += kThreads) {
        const int row = i / TileT::kChunks, c = i % TileT::kChunks;
        if (row >= count || c * kChunk >= head_dim) store_shared(tile.chunk(row, c), Vec16{});
    }
}

}  // namespace longrope
