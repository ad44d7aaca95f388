// dk and dv for Hopper: keys of a key head, and a walk over the queries of all heads that share it.
#pragma once

#include "backward.cuh"

namespace longrope {

// 64 kTiles keys of one key head.
template <int kTiles>
struct KeyWork {
    static constexpr int kKeys = kTiles * kGroupRows;

    int64_t head;
    Sequence s;
    int64_t first;  // key of the sequence
    int count;      // keys that exist; none: nothing to do

    // Under a causal mask the first keys are seen most, so the blocks come the other way round than those of queries.
    LONGROPE_DEVICE KeyWork(const AttentionParams& p, const Schedule& schedule, int32_t tile)
        : head(schedule.at(tile).pair % p.key_heads),
          s(p, schedule.at(tile).pair / p.key_heads),
          first(int64_t{schedule.row_blocks - 1 - schedule.at(tile).row_block} * kKeys),
          count(clamped(s.key_length - first, kKeys)) {}
    LONGROPE_DEVICE int64_t first_of(int tile) const { return first + tile * kGroupRows; }
    LONGROPE_DEVICE int count_of(int tile) const { return clamped(count - tile * kGroupRows, kGroupRows); }
    // Queries that see any of the keys, from a multiple of the tile on.
    LONGROPE_DEVICE Interval queries(const AttentionParams& p, int tile) const {
        if (count == 0) return {0, 0};
        const Interval lowest = s.seeing(p, first), highest = s.seeing(p, first + count - 1);
        return {lowest.low / tile * tile, highest.high < s.query_count ? highest.high : s.query_count};
    }
};

// A consumer's walk over the queries that see a block of keys, of all heads that share the key head, a tile at a time.
struct QueryWalk {
    static constexpr int kBytes = 24;  // of a consumer's thread

    SeenColumns<8> seeing;  // the queries that see a key
    SharedAddress range;    // those that the block walks
    int first = 0;          // query of the tile
    int left = 0;           // tiles that are to come, this one included

    // What a thread keeps from `notes` on.
    LONGROPE_DEVICE explicit QueryWalk(SharedAddress notes)
        : seeing{notes + 16 * (thread_index() - kGroupThreads)},
          range(notes + 16 * kGroups * kGroupThreads + 8 * (thread_index() - kGroupThreads)) {}

    // For tile `of_keys` of 64 keys of a block, in tiles of `rows` queries.
    template <class Work>
    LONGROPE_DEVICE void begin(const AttentionParams& p, const Work& work, int of_keys, int rows) {
        const Interval queries = work.queries(p, rows);
        const int end = static_cast<int>(queries.high);
        first = static_cast<int>(queries.low);
        left = first < end ? (end - first + rows - 1) / rows * static_cast<int>(p.query_heads / p.key_heads) : 0;
        store_shared(range, Vec8{{static_cast<uint32_t>(first), static_cast<uint32_t>(end)}});
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = warp_index() % kGroupWarps * 16 + 8 * r + lane_index() / 4;
            seeing.put(r, key < work.count_of(of_keys) ? work.s.seeing(p, work.first_of(of_keys) + key) : Interval{});
        }
    }
    LONGROPE_DEVICE void move(int rows) {
        const Vec8 walked = load_shared<Vec8>(range);
        first += rows;
        if (first >= static_cast<int>(walked.word[1])) first = static_cast<int>(walked.word[0]);  // the next head
    }
};

template <int kHeadDim>
struct KeyShape {
    static constexpr int kKeyTiles = kGroups, kRows = kHeadDim <= 64 ? 128 : 64, kStages = 4;
    static constexpr int kSteps = kHeadDim / 16, kRowSteps = kRows / 16, kColumns = (kHeadDim + 63) / 64 * 64;
    using KeyTile = WideTile<kGroupRows, kColumns>;
    using RowTile = WideTile<kRows, kColumns>;
    using Keys = Ring<TilePair<KeyTile>, 1, kGroupWarps>;  // of a group: keys and values
    using Rows = Ring<TilePair<RowTile>, kStages>;         // queries and grad_out
    // Behind the tiles a stage's {lse in units of log 2, delta times the scale}, by row.
    static constexpr int kRowsAt = kGroups * Keys::kTileBytes, kKnownAt = kRowsAt + Rows::kTileBytes;
    static constexpr int kNotesAt = kKnownAt + kStages * kRows * 8;
    static constexpr int kBarriersAt = kNotesAt + kGroups * kGroupThreads * QueryWalk::kBytes;
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
LONGROPE_DEVICE void produce_queries(const GradientLaunch& launch) {
    const AttentionParams& p = launch.params.forward;
    const int64_t heads = p.query_heads / p.key_heads;
    int count = 0, blocks = 0;  // of tiles and of blocks of keys so far
    each_tile(launch.schedule, [&](int32_t tile) {
        const KeyWork<S::kKeyTiles> work(p, launch.schedule, tile);
        if (work.count == 0) return;
        const auto bring_keys = [&] {
            for (int i = 0; i < S::kKeyTiles; ++i) {
                const auto keys = S::keys(i);
                keys.wait_free(blocks);
                if (lane_index() != 0) continue;
                const auto to = keys.tile(blocks);
                const int64_t token = work.s.key_start + work.first_of(i);
                keys.expect(blocks);
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
                    rows.fill_copied(count);
                } else if (lane_index() == 0) {
                    rows.expect(count);
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
                rows.fill(count);
                if (first_tile) bring_keys();  // after the queries, for which no group has to end its last block
                first_tile = false;
            }
        if (first_tile) bring_keys();
    });
}

template <class T, int kHeadDim>
LONGROPE_DEVICE void consume_queries(const GradientLaunch& launch, int group) {
    using S = KeyShape<kHeadDim>;
    constexpr int kRows = S::kRows, kRowSteps = S::kRowSteps;
    const AttentionParams& p = launch.params.forward;
    const auto own = S::keys(group);
    const auto rows = S::rows();
    QueryWalk walk(S::kNotesAt);
    if (group == 1) give_turn(group);
    int count = 0, blocks = 0;  // of tiles and of blocks of keys so far

    each_tile(launch.schedule, [&](int32_t tile) {
        {
            const KeyWork<S::kKeyTiles> work(p, launch.schedule, tile);
            if (work.count == 0) return;
            walk.begin(p, work, group, kRows);
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
            walk.seeing.mask(walk.first, scores, slopes);
            pack_left<T>(weights, scores);
            pack_left<T>(packed, slopes);
        };

        own.wait_full(blocks);
        if (walk.left > 0) {
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
            for (++count, --walk.left; walk.left > 0; ++count, --walk.left) {
                float scores[kRows / 8][4], slopes[kRows / 8][4];
                walk.move(kRows);
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
        const KeyWork<S::kKeyTiles> work(p, launch.schedule, tile);
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
        gradients.store_with_frequencies(
            d_keys, regime, head_dim, [&](int r) { return SharedRow<T, typename S::KeyTile>{keys, r}; },
            launch.scratch.key_part == nullptr ? nullptr : launch.scratch.key_part + place * regime.pairs, position_of,
            [&](int r) { return row_at(launch.params.grad_key, r); });
        proxy_fence();
        own.release(blocks);
        ++blocks;
    });
}

template <class T, int kHeadDim>
LONGROPE_KERNEL(kThreads)
key_gradient_sm90_kernel(const LONGROPE_GRID_CONSTANT GradientLaunch launch) {
    using S = KeyShape<kHeadDim>;
    // As run_pipeline: through its functions ptxas 13.0 keeps 8 bytes of head_dim 128 in local memory.
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

// Over blocks of the keys of shape S.
template <class S, class Kernel>
void launch_key_gradient(Kernel kernel, const AttentionBackwardParams& params, const BackwardScratch& scratch,
                         int64_t query_tokens, int64_t key_tokens, Stream stream) {
    const AttentionParams& p = params.forward;
    const Schedule schedule = schedule_of(p.batch * p.key_heads, (scratch.key_blocks + S::kKeyTiles - 1) / S::kKeyTiles,
                                          query_tokens * (p.query_heads / p.key_heads) * p.head_dim * 4);
    launch_gradients(kernel, params, scratch, schedule, S::kSharedBytes, S::kRows, kGroupRows, query_tokens, key_tokens,
                     stream);
}

}  // namespace longrope
