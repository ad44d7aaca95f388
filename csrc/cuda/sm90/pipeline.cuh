// What the persistent kernels for Hopper are made of: a producer warp that keeps bulk copies coming through rings of
// tiles in shared memory, and two consumer warpgroups of 64 rows each that take turns at the tensor cores.
#pragma once

#include "../schedule.cuh"
#include "../sequence.cuh"
#include "../tile.cuh"

namespace longrope {

constexpr int kGroups = 2, kGroupThreads = 128, kGroupWarps = kGroupThreads / 32, kGroupRows = 64;
constexpr int kRows = kGroups * kGroupRows;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
// Together the 504 that 384 threads begin with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kSectionBytes = 24 << 20;  // of keys and values that a section of the schedule keeps in L2: half of it

// Named barriers, one of each kind for a consumer group.
constexpr int kTurn = 1, kOwn = 1 + kGroups;

LONGROPE_DEVICE void wait_for_turn(int group) {
    named_sync(kTurn + group, kGroups * kGroupThreads);
}
LONGROPE_DEVICE void give_turn(int group) {
    named_arrive(kTurn + 1 - group, kGroups * kGroupThreads);
}
LONGROPE_DEVICE void group_sync(int group) {
    named_sync(kOwn + group, kGroupThreads);
}

// Stages of tiles, or of tiles that come together, and an mbarrier for a stage that is full and one for a stage that
// is free again, when kReaders warps have released it.
template <class TileT, int kStages, int kReaders = kGroups * kGroupWarps>
struct Ring {
    static constexpr int kTileBytes = kStages * TileT::kBytes, kBarrierBytes = 16 * kStages;

    SharedAddress tiles, barriers;

    LONGROPE_DEVICE static int stage(int count) { return count % kStages; }
    LONGROPE_DEVICE static uint32_t parity(int count) { return count / kStages & 1; }
    LONGROPE_DEVICE TileT tile(int count) const { return {tiles + stage(count) * TileT::kBytes}; }
    LONGROPE_DEVICE SharedAddress full(int count) const { return barriers + 16 * stage(count); }
    LONGROPE_DEVICE SharedAddress free(int count) const { return full(count) + 8; }

    // `arrivals`: of the producer, besides bytes, that make a stage full.
    LONGROPE_DEVICE void begin(int arrivals = 1) const {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full(i), arrivals);
            mbarrier_init(free(i), kReaders);
        }
    }
    LONGROPE_DEVICE void wait_full(int count) const { mbarrier_wait(full(count), parity(count)); }
    LONGROPE_DEVICE void wait_free(int count) const { mbarrier_wait(free(count), parity(count) ^ 1); }
    // Bulk copies are to bring the tile; by one thread, and an arrival of the producer.
    LONGROPE_DEVICE void expect(int count) const { mbarrier_expect(full(count), TileT::kBytes); }
    // What the producer's warp has stored in the stage, or beside it, is there.
    LONGROPE_DEVICE void fill(int count) const {
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(full(count));
    }
    // What it has begun to copy there by copy_rows is, and the tensor cores may read it.
    LONGROPE_DEVICE void fill_copied(int count) const {
        copy_async_commit();
        copy_async_wait<0>();
        proxy_fence();
        fill(count);
    }
    // The warp has done with the tile.
    LONGROPE_DEVICE void release(int count) const {
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(free(count));
    }
};

// A kernel: its rings begin, then a warp produces and two warpgroups consume, the first of which has the first turn.
template <class Begin, class Produce, class Consume>
LONGROPE_DEVICE void run_pipeline(const Begin& begin, const Produce& produce, const Consume& consume) {
    if (thread_index() == 0) {
        begin();
        proxy_fence();
    }
    block_sync();
    const int group = warp_index() / kGroupWarps - 1;
    if (group < 0) {
        shrink_registers<kProducerRegisters>();
        if (warp_index() == 0) produce();
    } else {
        grow_registers<kConsumerRegisters>();
        if (group == 1) give_turn(group);
        consume(group);
    }
}

// Calls `visit(tile)` for each of the block's tiles of the schedule.
template <class Visit>
LONGROPE_DEVICE void each_tile(const Schedule& schedule, const Visit& visit) {
    const int32_t blocks = static_cast<int32_t>(block_count());
    for (int32_t round = 0; round * blocks < schedule.tiles(); ++round) {
        const int32_t tile = Schedule::dealt(round, static_cast<int32_t>(block_index()), blocks);
        if (tile < schedule.tiles()) visit(tile);
    }
}

// Pairs, tiles of a pair, and the bytes of a pair's keys and values, as a schedule.
inline Schedule schedule_of(int64_t pairs, int64_t row_blocks, int64_t pair_bytes) {
    if (pairs * row_blocks >= 1 << 30) throw std::runtime_error("a schedule of 2^30 tiles or more");
    const int64_t section = kSectionBytes / (pair_bytes + 1) + 1;
    return {static_cast<int32_t>(pairs), static_cast<int32_t>(row_blocks),
            static_cast<int32_t>(section < pairs ? section : pairs)};
}

// As many blocks as can have a tile at once.
inline int blocks_of(const Schedule& schedule) {
    const int multiprocessors = multiprocessor_count();
    return multiprocessors < schedule.tiles() ? multiprocessors : schedule.tiles();
}

// The tensor map of an operand [batch, heads, tokens, head_dim] in boxes of the slabs of a tile of `rows` tokens.
// Dimensions of stride 0 (packed sequences, expanded tensors) are those of one element.
inline TensorMap operand_map(const Operand& x, const AttentionParams& p, int64_t heads, int64_t tokens, int rows) {
    const auto extent = [](int64_t n, int64_t stride) { return static_cast<uint32_t>(stride == 0 ? 1 : n); };
    const auto bytes = [&](uint32_t n, int64_t stride) {
        return static_cast<uint64_t>(n == 1 ? (p.head_dim + 7) / 8 * 8 : stride) * 2;
    };
    const uint32_t of_heads = extent(heads, x.head_stride), batch = extent(p.batch, x.batch_stride);
    const uint32_t of_tokens = static_cast<uint32_t>(tokens);
    return tensor_map(
        {x.data,
         4,
         Swizzle::k128,
         {static_cast<uint32_t>(p.head_dim), of_tokens, of_heads, batch},
         {64, static_cast<uint32_t>(rows), 1, 1},
         {bytes(of_tokens, x.token_stride), bytes(of_heads, x.head_stride), bytes(batch, x.batch_stride)}});
}

// Copies the tile of an operand that begins at (b, head, token) and a column; its bytes are for the caller to expect.
template <class TileT>
LONGROPE_DEVICE void copy_bulk(const TensorMap& map, const Operand& from, int64_t b, int64_t head, int64_t token,
                               TileT to, SharedAddress full, int column = 0) {
    const int32_t of_head = from.head_stride == 0 ? 0 : static_cast<int32_t>(head);
    const int32_t of_batch = from.batch_stride == 0 ? 0 : static_cast<int32_t>(b);
#pragma unroll
    for (int slab = 0; slab < TileT::kSlabs; ++slab)
        copy_tensor<4>(to.base + slab * TileT::kSlabBytes, map,
                       {column + 64 * slab, static_cast<int32_t>(token), of_head, of_batch}, full);
}

// Starts copying what there is of a tile of `left` rows that ends a sequence, zeros behind, by the producer's warp.
template <class T, class TileT>
LONGROPE_DEVICE void copy_rows(TileT tile, int64_t left, const Operand& x, int64_t b, int64_t head, int64_t token,
                               int64_t head_dim) {
    const T* base = row_of<T>(x, b, head, token);
    copy_tile<32>(
        tile, static_cast<int>(left), static_cast<int>(head_dim), [&](int r) { return base + r * x.token_stride; },
        lane_index());
}

}  // namespace longrope
