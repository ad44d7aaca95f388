// The rows that attention leaves in a warp's accumulators, on their way to memory.
#pragma once

#include "rows.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "tile.cuh"

namespace longrope {

// Normalises and stores rows [tile_row, tile_row + 16) of a tile of which `count` rows exist, and their lse: by way of
// these rows of `tile`, which the warp has to itself, so that they leave in 16-byte pieces.
template <class T, class TileT, int kTiles>
LONGROPE_DEVICE void store_16_rows(const AttentionParams& p, const Sequence& s, const RowMap& map, int64_t first_row,
                                   int count, TileT tile, int tile_row, const float (&out)[kTiles][4],
                                   const float (&top)[2], const float (&total)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int of_tile = tile_row + 8 * r + lane_index() / 4;
        const float sum = quad_sum(total[r]);
        const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
            store_shared(tile.element(of_tile, 8 * n + lane_index() % 4 * 2),
                         pack<T>(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse));
        const int64_t row = first_row + of_tile;
        if (of_tile < count && lane_index() % 4 == 0)
            store_global(s.lse(p, map.head(row), map.token(row)),
                         sum != 0.0f ? (top[r] + log2f(sum)) * kLn2 : -infinity());
    }
    warp_sync();
    const int chunks = static_cast<int>(p.head_dim) / kChunk;
    for (int i = lane_index(); i < 16 * chunks; i += 32) {
        const int of_tile = tile_row + i / chunks, c = i % chunks;
        const int64_t row = first_row + of_tile;
        if (of_tile < count)
            GlobalRow<T>{s.query_row<T>(p.out, map.head(row), map.token(row))}.store16(
                c, load_shared<Vec16>(tile.chunk(of_tile, c)));
    }
}

}  // namespace longrope
