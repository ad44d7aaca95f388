// Gradients of attention for Hopper, up to head_dim 128: bulk copies, wgmma, a producer and two consumer warpgroups;
// the same bits in every run, and the sums of sm80/attention_backward.cu.
//
//     P = 2^(S - lse)    dP = dO v^T    dS = P (dP - delta)    dq = dS k    dk = dS^T q    dv = P^T dO
//
// After delta (attention_delta.cu), two persistent kernels (schedule.cuh):
//
//   query_gradient   a block takes 128 queries of one head, a consumer 64 of them, and walks 128 keys at a time:
//                    S = q k^T and dP = dO v^T, both from shared memory, dq += dS k with dS from registers
//   key_gradient     a block takes 128 keys of one key head, a consumer 64 of them, and walks the queries of each of
//                    the head's query heads, 64 or 128 at a time: S^T = k q^T and dP^T = v dO^T from shared memory,
//                    dv += P^T dO and dk += dS^T q with P^T and dS^T from registers
//
// S and dP are computed twice. One pass would save two products in seven, but then the parts of dq that blocks of keys
// have must meet in memory: 64 KB of fp32 to add, read and write, for every 128 x 128 scores, in an order that has to
// be waited for to be the same in every run. With two passes every sum has one order by itself, and no memory besides.
//
// A consumer issues the products that use what it made of the tile before together with those of the next tile, in turn
// with the other group, and does its exponentials under that one's products:
//
//     group 0   dq += dS(i-1) k(i-1) | dP(i) | S(i) |   dS(i) from S(i), dP(i)      |
//     group 1                                       | dq += dS(i-1) k(i-1) | dP(i) | S(i) |   ...
//
// Registers are what bounds the tiles: 64 for dq and 128 for S and dP of 128 keys; 128 for dk and dv and 64 for S and
// dP of 64 queries (head_dim 128). Packed dS takes the place of S. So S(i) is issued when the product of dS(i-1) is
// done, under dP(i); and in the other kernel S(i) under the second of the two products with what was packed.
//
// For 128 rows and 128 keys at head_dim 128, in cycles of a multiprocessor at 4,096 operations and 128 bytes of shared
// memory a cycle:
//
//                    tensor cores   shared memory, wgmma and copies   exp2, 16 a cycle   from L2
//   query_gradient          3,072                     2,048 +   512              1,024   64 KB, 21 bytes a cycle
//   key_gradient            4,096                     3,072 +   512              1,024   64 KB, 16 bytes a cycle
//
// Bound by the tensor cores; 7,168 cycles a tile, of which 5,120 are what is usually counted as the work of a backward
// pass (71%). The schedulers issue about 8 instructions a score in the first and 10 in the second (SASS): 1,024 and
// 1,280 cycles.
//
// Rows past a sequence's end would reach a sum as 0 x NaN, and there the next sequence of the batch begins: the last
// tile of keys, or of queries and grad_out, is copied row by row, with zeros from its end on.
#include "../kernels.h"
#include "gradients.cuh"

namespace longrope {
namespace {

// Together the 504 that 384 threads begin with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

struct BackwardLaunch {
    TensorMap queries, grads, keys, values;  // rotated queries, grad_out, rotated keys, values
    AttentionBackwardParams params;
    BackwardScratch scratch;
    Schedule schedule;
    ScoreScale scale;
};

LONGROPE_DEVICE int clamped(int64_t x, int most) {
    return static_cast<int>(x < 0 ? 0 : x < most ? x : most);
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

// And waits until the tensor cores may read it.
LONGROPE_DEVICE void finish_copied_rows() {
    copy_async_commit();
    copy_async_wait<0>();
    proxy_fence();
    warp_sync();
}

// 128 queries of one head.
struct QueryWork {
    int64_t head, key_head;
    Sequence s;
    int64_t first;  // query of the sequence
    int count;      // queries that exist; none: nothing to do

    LONGROPE_DEVICE QueryWork(const AttentionParams& p, const Schedule::Place& place)
        : head(place.pair % p.query_heads),
          key_head(head / (p.query_heads / p.key_heads)),
          s(p, place.pair / p.query_heads),
          first(int64_t{place.row_block} * kRows),
          count(clamped(s.query_count - first, kRows)) {}
    LONGROPE_DEVICE int64_t first_of(int group) const { return first + group * kGroupRows; }
    LONGROPE_DEVICE int count_of(int group) const { return clamped(count - group * kGroupRows, kGroupRows); }
    // Keys that any of the queries sees, from a multiple of the tile on.
    LONGROPE_DEVICE Interval keys(const AttentionParams& p, int tile) const {
        if (count == 0) return {0, 0};
        const Interval lowest = s.visible(p, first), highest = s.visible(p, first + count - 1);
        return {lowest.low / tile * tile, highest.high < s.key_length ? highest.high : s.key_length};
    }
};

template <int kHeadDim>
struct QueryShape {
    static constexpr int kKeys = 128, kStages = 2;
    static constexpr int kSteps = kHeadDim / 16, kKeySteps = kKeys / 16, kColumns = (kHeadDim + 63) / 64 * 64;
    using RowTile = WideTile<kGroupRows, kColumns>;
    using KeyTile = WideTile<kKeys, kColumns>;
    using Rows = Ring<TilePair<RowTile>, 1, kGroupWarps>;  // of a group: queries and grad_out
    using Keys = Ring<KeyTile, kStages>;
    static constexpr int kKeysAt = kGroups * Rows::kTileBytes, kValuesAt = kKeysAt + Keys::kTileBytes;
    // Of a consumer's thread: the keys that its rows see, and what is known of the rows.
    static constexpr int kSeenAt = kValuesAt + Keys::kTileBytes, kKnownAt = kSeenAt + kGroups * kGroupThreads * 16;
    static constexpr int kBarriersAt = kKnownAt + kGroups * kGroupThreads * 16;
    static constexpr int kKeyBarriersAt = kBarriersAt + kGroups * Rows::kBarrierBytes;
    static constexpr int kSharedBytes = kKeyBarriersAt + 2 * Keys::kBarrierBytes;
    static_assert(kSharedBytes <= 227 << 10, "the tiles do not fit a multiprocessor");

    LONGROPE_DEVICE static Rows rows(int group) {
        return {static_cast<SharedAddress>(group * Rows::kTileBytes),
                static_cast<SharedAddress>(kBarriersAt + group * Rows::kBarrierBytes)};
    }
    LONGROPE_DEVICE static Keys keys() { return {kKeysAt, kKeyBarriersAt}; }
    LONGROPE_DEVICE static Keys values() { return {kValuesAt, kKeyBarriersAt + Keys::kBarrierBytes}; }
};

template <class T, class S>
LONGROPE_DEVICE void produce_keys(const BackwardLaunch& launch) {
    const AttentionParams& p = launch.params.forward;
    int count = 0, blocks = 0;  // of tiles and of blocks of queries so far
    each_tile(launch.schedule, [&](int32_t tile) {
        const QueryWork work(p, launch.schedule.at(tile));
        if (work.count == 0) return;
        const auto bring_queries = [&] {
            for (int group = 0; group < kGroups; ++group) {
                const auto rows = S::rows(group);
                rows.wait_free(blocks);
                if (lane_index() != 0) continue;
                const auto to = rows.tile(blocks);
                const int64_t token = work.s.query_slot + work.first_of(group);
                mbarrier_expect(rows.full(blocks), to.kBytes);
                copy_bulk(launch.queries, launch.scratch.query, work.s.b, work.head, token, to.first(),
                          rows.full(blocks));
                copy_bulk(launch.grads, launch.params.grad_out, work.s.b, work.head, token, to.second(),
                          rows.full(blocks));
            }
            ++blocks;
        };
        const Interval seen = work.keys(p, S::kKeys);
        const auto keys = S::keys(), values = S::values();
        for (int64_t first = seen.low; first < seen.high; first += S::kKeys, ++count) {
            const int64_t left = work.s.key_length - first, token = work.s.key_start + first;
            values.wait_free(count);
            if (lane_index() == 0) {
                mbarrier_expect(values.full(count), S::KeyTile::kBytes);
                copy_bulk(launch.values, p.value, work.s.b, work.key_head, token, values.tile(count),
                          values.full(count));
            }
            keys.wait_free(count);  // later: the keys are multiplied once more
            if (left < S::kKeys) {
                copy_rows<T>(keys.tile(count), left, launch.scratch.key, work.s.b, work.key_head, token, p.head_dim);
                finish_copied_rows();
                if (lane_index() == 0) mbarrier_arrive(keys.full(count));
            } else if (lane_index() == 0) {
                mbarrier_expect(keys.full(count), S::KeyTile::kBytes);
                copy_bulk(launch.keys, launch.scratch.key, work.s.b, work.key_head, token, keys.tile(count),
                          keys.full(count));
            }
            if (first == seen.low) bring_queries();  // after the keys, for which no group has to end its last block
        }
        if (seen.low >= seen.high) bring_queries();
    });
}

template <class T, int kHeadDim>
LONGROPE_DEVICE void consume_keys(const BackwardLaunch& launch, int group) {
    using S = QueryShape<kHeadDim>;
    constexpr int kKeys = S::kKeys, kKeySteps = S::kKeySteps;
    const AttentionParams& p = launch.params.forward;
    const auto rows = S::rows(group);
    const auto keys = S::keys(), values = S::values();
    const int consumer = thread_index() - kGroupThreads;
    const SeenColumns seen_keys{static_cast<SharedAddress>(S::kSeenAt + 16 * consumer)};
    const SharedAddress known_at = S::kKnownAt + 16 * consumer;
    if (group == 1) give_turn(group);
    int count = 0, blocks = 0;  // of tiles and of blocks of queries so far

    each_tile(launch.schedule, [&](int32_t tile) {
        int first, end;  // keys that the block visits
        {
            const QueryWork work(p, launch.schedule.at(tile));
            if (work.count == 0) return;
            const int64_t of_group = work.first_of(group);
            const int rows_here = work.count_of(group);
            const Interval seen = work.keys(p, kKeys);
            first = static_cast<int>(seen.low);
            end = static_cast<int>(seen.high);
            Interval mine[2] = {};
            Float4 known{};  // lse in units of log 2 and delta times the scale, by row
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = warp_index() % kGroupWarps * 16 + 8 * r + lane_index() / 4;
                if (row >= rows_here) continue;
                mine[r] = work.s.visible(p, of_group + row);
                const float* lse = work.s.lse(p, work.head, of_group + row);
                known.at[2 * r] = load_global(lse) * kLog2E;
                known.at[2 * r + 1] =
                    load_global(static_cast<const float*>(launch.scratch.delta + (lse - p.lse))) * p.scale;
            }
            seen_keys.put(mine);
            store_shared(known_at, known);
        }
        const auto queries = rows.tile(blocks).first(), grads = rows.tile(blocks).second();
        float out[kHeadDim / 8][4] = {};
        uint32_t packed[kKeySteps][4];  // dS

        const auto multiply_keys = [&](auto& scores, int at) {
            const auto k = keys.tile(at).by_columns(), q = typename S::RowTile{anew(queries.base)}.by_columns();
#pragma unroll
            for (int step = 0; step < S::kSteps; ++step)
                group_multiply_add<T>(scores, advance(q, S::RowTile::columns_at(step)),
                                      advance(k, S::KeyTile::columns_at(step)), step > 0);
            group_commit();
        };
        const auto multiply_values = [&](auto& slopes, int at) {
            const auto v = values.tile(at).by_columns(), g = typename S::RowTile{anew(grads.base)}.by_columns();
#pragma unroll
            for (int step = 0; step < S::kSteps; ++step)
                group_multiply_add<T>(slopes, advance(g, S::RowTile::columns_at(step)),
                                      advance(v, S::KeyTile::columns_at(step)), step > 0);
            group_commit();
        };
        const auto add_to_gradient = [&](int at) {
            const MatrixDescriptor k = keys.tile(at).by_rows();
#pragma unroll
            for (int j = 0; j < kKeySteps; ++j)
                group_multiply_add<T, true>(out, packed[j], advance(k, S::KeyTile::rows_at(j)), true);
            group_commit();
        };
        const auto pack_slopes = [&](auto& scores, auto& slopes) {
            const Float4 x = load_shared<Float4>(known_at);
            turn_into_gradients(scores, slopes, launch.scale, p.scale, [&](int) {
                return KnownRows{{x.at[0], x.at[0], x.at[2], x.at[2]}, {x.at[1], x.at[1], x.at[3], x.at[3]}};
            });
            seen_keys.mask(first, slopes);
            pack_left<T>(packed, slopes);
        };

        rows.wait_full(blocks);
        if (first < end) {
            {
                float scores[kKeys / 8][4], slopes[kKeys / 8][4];
                keys.wait_full(count);
                values.wait_full(count);
                wait_for_turn(group);
                group_fence();
                multiply_values(slopes, count);
                multiply_keys(scores, count);
                give_turn(group);
                group_wait<0>(scores, slopes);
                values.release(count);
                pack_slopes(scores, slopes);
            }
            for (first += kKeys, ++count; first < end; first += kKeys, ++count) {
                float scores[kKeys / 8][4], slopes[kKeys / 8][4];
                keys.wait_full(count);
                values.wait_full(count);
                wait_for_turn(group);
                group_fence();
                add_to_gradient(count - 1);
                multiply_values(slopes, count);
                group_wait<1>(out, packed);
                keys.release(count - 1);
                group_fence();
                multiply_keys(scores, count);
                give_turn(group);
                group_wait<0>(scores, slopes);
                values.release(count);
                pack_slopes(scores, slopes);
            }
            group_fence();
            add_to_gradient(count - 1);
            group_wait<0>(out, packed);
            keys.release(count - 1);
        }
        group_sync(group);  // no warp of the group reads grad_out any more
        // Worked out anew: registers are short in the loop before.
        const QueryWork work(p, launch.schedule.at(tile));
        const Regime regime = regime_of(p.rotation, work.s.b);
        const int64_t of_group = work.first_of(group);
        // Parts of a key head: the blocks of its query heads one after another.
        const int64_t of_head = launch.scratch.row_blocks / (p.query_heads / p.key_heads);
        const int64_t place = (work.s.b * p.query_heads + work.head) * of_head + of_group / kGroupRows;
        const GradientRows<typename S::RowTile> gradients{grads, group, work.count_of(group)};
        gradients.template store_with_frequencies<T>(
            out, regime, static_cast<int>(p.head_dim), queries,
            launch.scratch.query_part == nullptr ? nullptr : launch.scratch.query_part + place * regime.pairs,
            [&](int r) { return work.s.query_position(p, of_group + r); },
            [&](int r) {
                return GlobalRow<T>{work.s.query_row<T>(launch.params.grad_query, work.head, of_group + r)};
            });
        proxy_fence();
        rows.release(blocks);
        ++blocks;
    });
}

template <class T, int kHeadDim>
LONGROPE_KERNEL(kThreads)
query_gradient_sm90_kernel(const LONGROPE_GRID_CONSTANT BackwardLaunch launch) {
    using S = QueryShape<kHeadDim>;
    if (thread_index() == 0) {
        for (int group = 0; group < kGroups; ++group) S::rows(group).begin();
        S::keys().begin();
        S::values().begin();
        proxy_fence();
    }
    block_sync();
    const int group = warp_index() / kGroupWarps - 1;
    if (group < 0) {
        shrink_registers<kProducerRegisters>();
        if (warp_index() == 0) produce_keys<T, S>(launch);
    } else {
        grow_registers<kConsumerRegisters>();
        consume_keys<T, kHeadDim>(launch, group);
    }
}

// 128 keys of one key head.
struct KeyWork {
    int64_t head;
    Sequence s;
    int64_t first;  // key of the sequence
    int count;      // keys that exist; none: nothing to do

    // Under a causal mask the first keys are seen most, so the blocks come the other way round than those of queries.
    LONGROPE_DEVICE KeyWork(const AttentionParams& p, const Schedule& schedule, int32_t tile)
        : head(schedule.at(tile).pair % p.key_heads),
          s(p, schedule.at(tile).pair / p.key_heads),
          first(int64_t{schedule.row_blocks - 1 - schedule.at(tile).row_block} * kRows),
          count(clamped(s.key_length - first, kRows)) {}
    LONGROPE_DEVICE int64_t first_of(int group) const { return first + group * kGroupRows; }
    LONGROPE_DEVICE int count_of(int group) const { return clamped(count - group * kGroupRows, kGroupRows); }
    // Queries that see any of the keys, from a multiple of the tile on.
    LONGROPE_DEVICE Interval queries(const AttentionParams& p, int tile) const {
        if (count == 0) return {0, 0};
        const Interval lowest = s.seeing(p, first), highest = s.seeing(p, first + count - 1);
        return {lowest.low / tile * tile, highest.high < s.query_count ? highest.high : s.query_count};
    }
};

template <int kHeadDim>
struct KeyShape {
    static constexpr int kRows = kHeadDim <= 64 ? 128 : 64, kStages = 4;
    static constexpr int kSteps = kHeadDim / 16, kRowSteps = kRows / 16, kColumns = (kHeadDim + 63) / 64 * 64;
    using KeyTile = WideTile<kGroupRows, kColumns>;
    using RowTile = WideTile<kRows, kColumns>;
    using Keys = Ring<TilePair<KeyTile>, 1, kGroupWarps>;  // of a group: keys and values
    using Rows = Ring<TilePair<RowTile>, kStages>;         // queries and grad_out
    // Behind the tiles a stage's {lse in units of log 2, delta times the scale}, by row.
    static constexpr int kRowsAt = kGroups * Keys::kTileBytes, kKnownAt = kRowsAt + Rows::kTileBytes;
    // Of a consumer's thread: the queries that see its keys, and those that the block walks.
    static constexpr int kSeeingAt = kKnownAt + kStages * kRows * 8;
    static constexpr int kWalkAt = kSeeingAt + kGroups * kGroupThreads * 16;
    static constexpr int kBarriersAt = kWalkAt + kGroups * kGroupThreads * 8;
    static constexpr int kRowBarriersAt = kBarriersAt + kGroups * Keys::kBarrierBytes;
    static constexpr int kSharedBytes = kRowBarriersAt + Rows::kBarrierBytes;
    static_assert(kSharedBytes <= 227 << 10, "the tiles do not fit a multiprocessor");

    LONGROPE_DEVICE static Keys keys(int group) {
        return {static_cast<SharedAddress>(group * Keys::kTileBytes),
                static_cast<SharedAddress>(kBarriersAt + group * Keys::kBarrierBytes)};
    }
    LONGROPE_DEVICE static Rows rows() { return {kRowsAt, kRowBarriersAt}; }
    LONGROPE_DEVICE static SharedAddress known(int count, int row) {
        return kKnownAt + (Rows::stage(count) * kRows + row) * 8;
    }
};

template <class T, class S>
LONGROPE_DEVICE void produce_queries(const BackwardLaunch& launch) {
    const AttentionParams& p = launch.params.forward;
    const int64_t heads = p.query_heads / p.key_heads;
    int count = 0, blocks = 0;  // of tiles and of blocks of keys so far
    each_tile(launch.schedule, [&](int32_t tile) {
        const KeyWork work(p, launch.schedule, tile);
        if (work.count == 0) return;
        const auto bring_keys = [&] {
            for (int group = 0; group < kGroups; ++group) {
                const auto keys = S::keys(group);
                keys.wait_free(blocks);
                if (lane_index() != 0) continue;
                const auto to = keys.tile(blocks);
                const int64_t token = work.s.key_start + work.first_of(group);
                mbarrier_expect(keys.full(blocks), to.kBytes);
                copy_bulk(launch.keys, launch.scratch.key, work.s.b, work.head, token, to.first(), keys.full(blocks));
                copy_bulk(launch.values, p.value, work.s.b, work.head, token, to.second(), keys.full(blocks));
            }
            ++blocks;
        };
        const Interval seeing = work.queries(p, S::kRows);
        const auto rows = S::rows();
        bool first_tile = true;
        for (int64_t head = work.head * heads; head < (work.head + 1) * heads; ++head)
            for (int64_t first = seeing.low; first < seeing.high; first += S::kRows, ++count) {
                const int64_t left = work.s.query_count - first, token = work.s.query_slot + first;
                const auto to = rows.tile(count);
                rows.wait_free(count);
                if (left < S::kRows) {
                    copy_rows<T>(to.first(), left, launch.scratch.query, work.s.b, head, token, p.head_dim);
                    copy_rows<T>(to.second(), left, launch.params.grad_out, work.s.b, head, token, p.head_dim);
                    finish_copied_rows();
                    if (lane_index() == 0) mbarrier_arrive(rows.full(count));
                } else if (lane_index() == 0) {
                    mbarrier_expect(rows.full(count), to.kBytes);
                    copy_bulk(launch.queries, launch.scratch.query, work.s.b, head, token, to.first(),
                              rows.full(count));
                    copy_bulk(launch.grads, launch.params.grad_out, work.s.b, head, token, to.second(),
                              rows.full(count));
                }
                for (int r = lane_index(); r < S::kRows; r += 32) {
                    Float2 known{};
                    if (r < left) {
                        const float* lse = work.s.lse(p, head, first + r);
                        known = {
                            load_global(lse) * kLog2E,
                            load_global(static_cast<const float*>(launch.scratch.delta + (lse - p.lse))) * p.scale};
                    }
                    store_shared(S::known(count, r), known);
                }
                warp_sync();
                if (lane_index() == 0) mbarrier_arrive(rows.full(count));
                if (first_tile) bring_keys();  // after the queries, for which no group has to end its last block
                first_tile = false;
            }
        if (first_tile) bring_keys();
    });
}

template <class T, int kHeadDim>
LONGROPE_DEVICE void consume_queries(const BackwardLaunch& launch, int group) {
    using S = KeyShape<kHeadDim>;
    constexpr int kRows = S::kRows, kRowSteps = S::kRowSteps;
    const AttentionParams& p = launch.params.forward;
    const auto own = S::keys(group);
    const auto rows = S::rows();
    const int consumer = thread_index() - kGroupThreads;
    const SeenColumns seeing_queries{static_cast<SharedAddress>(S::kSeeingAt + 16 * consumer)};
    const SharedAddress walk = S::kWalkAt + 8 * consumer;
    if (group == 1) give_turn(group);
    int count = 0, blocks = 0;  // of tiles and of blocks of keys so far

    each_tile(launch.schedule, [&](int32_t tile) {
        int first, left;  // query of the tile, and tiles of all query heads that are to come
        {
            const KeyWork work(p, launch.schedule, tile);
            if (work.count == 0) return;
            const int64_t of_group = work.first_of(group);
            const int keys_here = work.count_of(group);
            const Interval seeing = work.queries(p, kRows);
            const int end = static_cast<int>(seeing.high);
            first = static_cast<int>(seeing.low);
            left = first < end ? (end - first + kRows - 1) / kRows * static_cast<int>(p.query_heads / p.key_heads) : 0;
            store_shared(walk, Vec8{{static_cast<uint32_t>(first), static_cast<uint32_t>(end)}});
            Interval mine[2] = {};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int key = warp_index() % kGroupWarps * 16 + 8 * r + lane_index() / 4;
                if (key < keys_here) mine[r] = work.s.seeing(p, of_group + key);
            }
            seeing_queries.put(mine);
        }
        const auto keys = own.tile(blocks).first(), values = own.tile(blocks).second();
        float d_keys[kHeadDim / 8][4] = {}, d_values[kHeadDim / 8][4] = {};
        uint32_t weights[kRowSteps][4], packed[kRowSteps][4];  // P^T and dS^T

        const auto multiply_columns = [&](auto& sums, auto left_tile, auto right_tile) {
            const auto a = typename S::KeyTile{anew(left_tile.base)}.by_columns(), b = right_tile.by_columns();
#pragma unroll
            for (int step = 0; step < S::kSteps; ++step)
                group_multiply_add<T>(sums, advance(a, S::KeyTile::columns_at(step)),
                                      advance(b, S::RowTile::columns_at(step)), step > 0);
            group_commit();
        };
        const auto multiply_rows = [&](auto& sums, auto& left_registers, auto right_tile) {
            const MatrixDescriptor b = right_tile.by_rows();
#pragma unroll
            for (int j = 0; j < kRowSteps; ++j)
                group_multiply_add<T, true>(sums, left_registers[j], advance(b, S::RowTile::rows_at(j)), true);
            group_commit();
        };
        const auto pack = [&](auto& scores, auto& slopes, int at) {
            turn_into_gradients(scores, slopes, launch.scale, p.scale, [&](int j) {
                const Float4 x = load_shared<Float4>(S::known(at, 8 * j + lane_index() % 4 * 2));
                return KnownRows{{x.at[0], x.at[2], x.at[0], x.at[2]}, {x.at[1], x.at[3], x.at[1], x.at[3]}};
            });
            seeing_queries.mask(first, scores, slopes);
            pack_left<T>(weights, scores);
            pack_left<T>(packed, slopes);
        };

        own.wait_full(blocks);
        if (left > 0) {
            {
                float scores[kRows / 8][4], slopes[kRows / 8][4];
                rows.wait_full(count);
                wait_for_turn(group);
                group_fence();
                multiply_columns(scores, keys, rows.tile(count).first());
                multiply_columns(slopes, values, rows.tile(count).second());
                give_turn(group);
                group_wait<0>(scores, slopes);
                pack(scores, slopes, count);
            }
            for (++count, --left; left > 0; ++count, --left) {
                float scores[kRows / 8][4], slopes[kRows / 8][4];
                const Vec8 range = load_shared<Vec8>(walk);
                first += kRows;
                if (first >= static_cast<int>(range.word[1])) first = static_cast<int>(range.word[0]);  // the next head
                rows.wait_full(count);
                wait_for_turn(group);
                group_fence();
                multiply_rows(d_values, weights, rows.tile(count - 1).second());
                multiply_rows(d_keys, packed, rows.tile(count - 1).first());
                group_wait<1>(d_values, weights);
                group_fence();
                multiply_columns(scores, keys, rows.tile(count).first());
                group_wait<1>(d_keys, packed);
                rows.release(count - 1);
                group_fence();
                multiply_columns(slopes, values, rows.tile(count).second());
                give_turn(group);
                group_wait<0>(scores, slopes);
                pack(scores, slopes, count);
            }
            group_fence();
            multiply_rows(d_values, weights, rows.tile(count - 1).second());
            multiply_rows(d_keys, packed, rows.tile(count - 1).first());
            group_wait<0>(d_values, weights, d_keys, packed);
            rows.release(count - 1);
        }
        group_sync(group);  // no warp of the group reads the values any more
        // Worked out anew: registers are short in the loop before.
        const KeyWork work(p, launch.schedule, tile);
        const Regime regime = regime_of(p.rotation, work.s.b);
        const int64_t of_group = work.first_of(group);
        const int64_t place = (work.s.b * p.key_heads + work.head) * launch.scratch.key_blocks + of_group / kGroupRows;
        const GradientRows<typename S::KeyTile> gradients{values, group, work.count_of(group)};
        const auto position_of = [&](int r) { return work.s.key_position(p, of_group + r); };
        const auto row_at = [&](const Operand& x, int r) {
            return GlobalRow<T>{row_of<T>(x, work.s.b, work.head, work.s.key_start + of_group + r)};
        };
        const int head_dim = static_cast<int>(p.head_dim);
        gradients.store(
            d_values, Regime{}, head_dim, position_of, [&](int r) { return row_at(launch.params.grad_value, r); },
            [](int) {});
        gradients.template store_with_frequencies<T>(
            d_keys, regime, head_dim, keys,
            launch.scratch.key_part == nullptr ? nullptr : launch.scratch.key_part + place * regime.pairs, position_of,
            [&](int r) { return row_at(launch.params.grad_key, r); });
        proxy_fence();
        own.release(blocks);
        ++blocks;
    });
}

template <class T, int kHeadDim>
LONGROPE_KERNEL(kThreads)
key_gradient_sm90_kernel(const LONGROPE_GRID_CONSTANT BackwardLaunch launch) {
    using S = KeyShape<kHeadDim>;
    if (thread_index() == 0) {
        for (int group = 0; group < kGroups; ++group) S::keys(group).begin();
        S::rows().begin(2);  // the copies, and what is known of the rows
        proxy_fence();
    }
    block_sync();
    const int group = warp_index() / kGroupWarps - 1;
    if (group < 0) {
        shrink_registers<kProducerRegisters>();
        if (warp_index() == 0) produce_queries<T, S>(launch);
    } else {
        grow_registers<kConsumerRegisters>();
        consume_queries<T, kHeadDim>(launch, group);
    }
}

// Both kernels, over tiles of `keys` keys and `rows` rows as theirs are.
template <class T, int kHeadDim>
void run(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
         int64_t key_tokens, Stream stream) {
    const AttentionParams& p = params.forward;
    const auto launch_with = [&](auto kernel, const Schedule& schedule, int shared_bytes, int rows, int keys) {
        if (schedule.tiles() == 0) return;
        const auto query_map = [&](const Operand& x) { return operand_map(x, p, p.query_heads, query_tokens, rows); };
        const auto key_map = [&](const Operand& x) { return operand_map(x, p, p.key_heads, key_tokens, keys); };
        const BackwardLaunch arguments{query_map(scratch.query),
                                       query_map(params.grad_out),
                                       key_map(scratch.key),
                                       key_map(p.value),
                                       params,
                                       scratch,
                                       schedule,
                                       ScoreScale(p.scale, p.softcap)};
        launch(kernel, blocks_of(schedule), kThreads, shared_bytes, arguments, stream);
    };
    const int64_t heads = p.query_heads / p.key_heads, head_bytes = p.head_dim * 4;
    using Q = QueryShape<kHeadDim>;
    launch_with(
        query_gradient_sm90_kernel<T, kHeadDim>,
        schedule_of(p.batch * p.query_heads, (p.query_tokens + kRows - 1) / kRows, key_tokens * head_bytes / heads),
        Q::kSharedBytes, kGroupRows, Q::kKeys);
    using K = KeyShape<kHeadDim>;
    launch_with(key_gradient_sm90_kernel<T, kHeadDim>,
                schedule_of(p.batch * p.key_heads, (scratch.key_blocks + kGroups - 1) / kGroups,
                            query_tokens * heads * head_bytes),
                K::kSharedBytes, K::kRows, kGroupRows);
}

template <class T>
void run_of_width(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
                  int64_t key_tokens, Stream stream) {
    const int64_t head_dim = params.forward.head_dim;
    if (head_dim <= 64) return run<T, 64>(params, scratch, query_tokens, key_tokens, stream);
    if (head_dim <= 96) return run<T, 96>(params, scratch, query_tokens, key_tokens, stream);
    run<T, 128>(params, scratch, query_tokens, key_tokens, stream);
}

}  // namespace

void attention_backward_sm90(const AttentionBackwardParams& params, const BackwardScratch& scratch,
                             int64_t query_tokens, int64_t key_tokens, Stream stream) {
    attention_delta(params, scratch, stream);
    if (params.forward.dtype == Dtype::kFloat16)
        return run_of_width<Half>(params, scratch, query_tokens, key_tokens, stream);
    run_of_width<BFloat16Bits>(params, scratch, query_tokens, key_tokens, stream);
}

}  // namespace longrope
