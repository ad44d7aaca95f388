// A tile of 16-bit elements in shared memory, and how it is filled and read.
//
// Columns come in slabs of 32 elements (64 bytes), row after row; the four 16-byte chunks of a row are permuted by bits
// of the row (the 64-byte swizzle of the bulk copy engine). The eight rows that one ldmatrix phase reads, and the rows
// that eight neighbouring threads write, then lie in eight different groups of banks, for any multiple of 32 columns.
#pragma once

#include "../core/host_device.h"
#include "primitives.cuh"

namespace longrope {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kRowCount, int kColumns>
struct Tile {
    static_assert(kColumns % 32 == 0, "a tile is cut into slabs of 32 columns");
    static constexpr int kRows = kRowCount, kChunks = kColumns / kChunk;
    static constexpr int kBytes = kRowCount * kColumns * 2;

    SharedAddress base;

    // By what the four chunks of a row are permuted.
    static LONGROPE_DEVICE int swizzle(int row) { return row >> 1 & 3; }
    LONGROPE_DEVICE SharedAddress chunk(int row, int c) const {
        return base + c / 4 * (kRowCount * 64) + row * 64 + ((c % 4 ^ swizzle(row)) << 4);
    }
    LONGROPE_DEVICE SharedAddress element(int row, int column) const {
        return chunk(row, column / kChunk) + column % kChunk * 2;
    }
    // chunk(first + row, 2 step + half), for a `first` in steps of 8 and a half of 0 or 1. The lane's part has two
    // values for all steps; the rest are constants.
    LONGROPE_DEVICE SharedAddress half_step(int first, int row, int half, int step) const {
        const SharedAddress even = row * 64 + ((half ^ swizzle(row)) << 4);
        return base + first * 64 + step / 2 * (kRowCount * 64) + (even ^ step % 2 << 5);
    }
};

// A tile as Hopper's bulk copies bring it and wgmma reads it: slabs of 64 columns (128 bytes), row after row, the eight
// chunks of a row permuted by the row (the 128-byte swizzle). `base` is a multiple of 1024.
template <int kRowCount, int kColumns>
struct WideTile {
    static_assert(kColumns % 64 == 0 && kRowCount % 8 == 0, "a tile is cut into slabs of 64 columns and 8 rows");
    static constexpr int kRows = kRowCount, kChunks = kColumns / kChunk, kSlabs = kColumns / 64;
    static constexpr int kSlabBytes = kRowCount * 128, kBytes = kSlabs * kSlabBytes;

    SharedAddress base;

    LONGROPE_DEVICE SharedAddress chunk(int row, int c) const {
        return base + c / 8 * kSlabBytes + row * 128 + ((c % 8 ^ row % 8) << 4);
    }
    LONGROPE_DEVICE SharedAddress element(int row, int column) const {
        return chunk(row, column / kChunk) + column % kChunk * 2;
    }

    LONGROPE_DEVICE SharedAddress half_step(int first, int row, int half, int step) const {
        return chunk(first + row, 2 * step + half);
    }

    // The operand whose k are the columns, and how far its columns 16 step and on are.
    LONGROPE_DEVICE MatrixDescriptor by_columns() const { return matrix_descriptor(base, 16, 1024, Swizzle::k128); }
    static constexpr LONGROPE_HOST_DEVICE uint32_t columns_at(int step) {
        return step / 4 * kSlabBytes + step % 4 * 32;
    }
    // The operand whose k are the rows ("transposed"), and how far its rows 16 step and on are.
    LONGROPE_DEVICE MatrixDescriptor by_rows() const {
        return matrix_descriptor(base, kSlabBytes, 1024, Swizzle::k128);
    }
    static constexpr LONGROPE_HOST_DEVICE uint32_t rows_at(int step) { return step * 2048; }
};

// Starts copying rows [0, count) of a tile, zeros below; `row_at(r)` is where row r lies, `thread` the
// place among the kThreads that copy.
template <int kThreads, class TileT, class RowAt>
LONGROPE_DEVICE void copy_tile(TileT tile, int count, int head_dim, const RowAt& row_at, int thread = thread_index()) {
#pragma unroll 4
    for (int i = thread; i < TileT::kRows * TileT::kChunks; i += kThreads) {
        const int row = i / TileT::kChunks, c = i % TileT::kChunks;
        const bool valid = row < count && c * kChunk < head_dim;
        const auto* from = row_at(valid ? row : 0);
        copy_async<16>(tile.chunk(row, c), valid ? from + c * kChunk : from, valid);
    }
}

// Rows [first, first + 16) and 16 columns as the left operand of multiply_add.
template <class TileT>
LONGROPE_DEVICE void load_left(uint32_t (&a)[4], TileT tile, int first, int step) {
    const int lane = lane_index();
    load_matrices(a, tile.half_step(first, lane % 16, lane / 16, step));
}

// Rows [first, first + 16) as columns of the right operand, 16 columns of the tile as its rows: two operands.
template <class TileT>
LONGROPE_DEVICE void load_right(uint32_t (&b)[4], TileT tile, int first, int step) {
    const int lane = lane_index();
    load_matrices(b, tile.half_step(first, lane / 16 * 8 + lane % 8, lane / 8 % 2, step));
}

// Rows [first, first + 16) as rows of the right operand, columns 16 step and on as its columns: two operands.
template <class TileT>
LONGROPE_DEVICE void load_right_transposed(uint32_t (&b)[4], TileT tile, int first, int step) {
    const int lane = lane_index();
    load_matrices_transposed(b, tile.half_step(first, lane % 16, lane / 16, step));
}

// The two operands that the loads above bring.
LONGROPE_DEVICE void right_half(uint32_t (&b)[2], const uint32_t (&both)[4], int half) {
    b[0] = both[2 * half];
    b[1] = both[2 * half + 1];
}

}  // namespace longrope
