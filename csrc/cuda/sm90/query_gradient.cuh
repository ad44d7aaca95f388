// dq for Hopper: 128 queries of a head, of which a consumer warpgroup has 64, and a walk over the keys.
#pragma once

#include "backward.cuh"

namespace longrope {

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
    // Above 128 dims registers are left for the scores of 64 keys, and shared memory for two tiles of keys and one of
    // values.
    static constexpr bool kWide = kHeadDim > 128;
    static constexpr int kKeys = kWide ? 64 : 128;
    static constexpr int kSteps = kHeadDim / 16, kKeySteps = kKeys / 16, kColumns = (kHeadDim + 63) / 64 * 64;
    using RowTile = WideTile<kGroupRows, kColumns>;
    using KeyTile = WideTile<kKeys, kColumns>;
    using ValueSlab = WideTile<kKeys, 64>;
    static constexpr int kSlabs = KeyTile::kSlabs, kValueSlabs = kWide ? kSlabs : 2 * kSlabs;
    using Rows = Ring<TilePair<RowTile>, 1, kGroupWarps>;  // of a group: queries and grad_out
    using Keys = Ring<KeyTile, 2>;
    // Values come slab by slab: one is free when the product with it is done, before that with the tile is. Where there
    // is room for one tile, the next one's lead is no more than that.
    using Values = Ring<ValueSlab, kValueSlabs>;
    static constexpr int kKeysAt = kGroups * Rows::kTileBytes, kValuesAt = kKeysAt + Keys::kTileBytes;
    // Of a row: the keys that it sees, {lse in units of log 2, delta times the scale}.
    static constexpr int kNotesAt = kValuesAt + Values::kTileBytes, kNoteBytes = 16;
    static constexpr int kBarriersAt = kNotesAt + kRows * kNoteBytes;
    static constexpr int kKeyBarriersAt = kBarriersAt + kGroups * Rows::kBarrierBytes;
    static constexpr int kValueBarriersAt = kKeyBarriersAt + Keys::kBarrierBytes;
    static constexpr int kSharedBytes = kValueBarriersAt + Values::kBarrierBytes;
    static_assert(kSharedBytes <= 227 << 10, "the tiles do not fit a multiprocessor");

    LONGROPE_DEVICE static Rows rows(int group) {
        return {static_cast<SharedAddress>(group * Rows::kTileBytes),
                static_cast<SharedAddress>(kBarriersAt + group * Rows::kBarrierBytes)};
    }
    LONGROPE_DEVICE static Keys keys() { return {kKeysAt, kKeyBarriersAt}; }
    LONGROPE_DEVICE static Values values() { return {kValuesAt, kValueBarriersAt}; }
};

template <class T, class S>
LONGROPE_DEVICE void produce_keys(const GradientLaunch& launch) {
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
                rows.expect(blocks);
                copy_bulk(launch.queries, launch.scratch.query, work.s.b, work.head, token, to.first(),
                          rows.full(blocks));
                copy_bulk(launch.grads, launch.params.grad_out, work.s.b, work.head, token, to.second(),
                          rows.full(blocks));
            }
            ++blocks;
        };
        const Interval seen = work.keys(p, S::kKeys);
        const auto keys = S::keys();
        const auto values = S::values();
        for (int64_t first = seen.low; first < seen.high; first += S::kKeys, ++count) {
            const int64_t left = work.s.key_length - first, token = work.s.key_start + first;
            const auto bring_values = [&] {
                for (int slab = count * S::kSlabs; slab < (count + 1) * S::kSlabs; ++slab) {
                    values.wait_free(slab);
                    if (lane_index() != 0) continue;
                    values.expect(slab);
                    copy_bulk(launch.values, p.value, work.s.b, work.key_head, token, values.tile(slab),
                              values.full(slab), 64 * (slab % S::kSlabs));
                }
            };
            if (!S::kWide) bring_values();  // with two stages they are free first: the keys are multiplied once more
            keys.wait_free(count);
            if (left < S::kKeys) {
                copy_rows<T>(keys.tile(count), left, launch.scratch.key, work.s.b, work.key_head, token, p.head_dim);
                keys.fill_copied(count);
            } else if (lane_index() == 0) {
                keys.expect(count);
                copy_bulk(launch.keys, launch.scratch.key, work.s.b, work.key_head, token, keys.tile(count),
                          keys.full(count));
            }
            if (S::kWide) bring_values();
            if (first == seen.low) bring_queries();  // after the keys, for which no group has to end its last block
        }
        if (seen.low >= seen.high) bring_queries();
    });
}

template <class T, int kHeadDim>
LONGROPE_DEVICE void consume_keys(const GradientLaunch& launch, int group) {
    using S = QueryShape<kHeadDim>;
    constexpr int kKeys = S::kKeys, kKeySteps = S::kKeySteps;
    const AttentionParams& p = launch.params.forward;
    const auto rows = S::rows(group);
    const auto keys = S::keys();
    const auto values = S::values();
    const SharedAddress of_row = S::kNotesAt + (16 * (warp_index() - kGroupWarps) + lane_index() / 4) * S::kNoteBytes;
    const SeenColumns<8 * S::kNoteBytes> seen_keys{of_row};
    const auto known_at = [=](int r) -> SharedAddress { return of_row + 8 * r * S::kNoteBytes + 8; };
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
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = warp_index() % kGroupWarps * 16 + 8 * r + lane_index() / 4;
                Interval mine{};
                Float2 known{};
                if (row < rows_here) {
                    mine = work.s.visible(p, of_group + row);
                    const float* lse = work.s.lse(p, work.head, of_group + row);
                    known = {load_global(lse) * kLog2E,
                             load_global(static_cast<const float*>(launch.scratch.delta + (lse - p.lse))) * p.scale};
                }
                if (lane_index() % 4 != 0) continue;
                seen_keys.put(r, mine);
                store_shared(known_at(r), known);  // read after the group's turn, which all of its threads wait for
            }
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
            const auto g = typename S::RowTile{anew(grads.base)}.by_columns();
#pragma unroll
            for (int slab = 0; slab < S::kSlabs; ++slab) {
                values.wait_full(at * S::kSlabs + slab);
                group_fence();  // a wait is a branch, behind which ptxas would put one of its own
                const auto v = values.tile(at * S::kSlabs + slab).by_columns();
#pragma unroll
                for (int step = 4 * slab; step < 4 * slab + 4 && step < S::kSteps; ++step)
                    group_multiply_add<T>(slopes, advance(g, S::RowTile::columns_at(step)),
                                          advance(v, S::ValueSlab::columns_at(step % 4)), step > 0);
                group_commit();
            }
        };
        const auto add_to_gradient = [&](int at) {
            const MatrixDescriptor k = keys.tile(at).by_rows();
#pragma unroll
            for (int j = 0; j < kKeySteps; ++j)
                group_multiply_add<T, true>(out, packed[j], advance(k, S::KeyTile::rows_at(j)), true);
            group_commit();
        };
        const auto pack_slopes = [&](auto& scores, auto& slopes) {
            const Float2 x = load_shared<Float2>(known_at(0)), y = load_shared<Float2>(known_at(1));
            turn_into_gradients(scores, slopes, launch.scale, p.scale,
                                [&](int) { return KnownRows{{x.x, x.x, y.x, y.x}, {x.y, x.y, y.y, y.y}}; });
            seen_keys.mask(first, slopes);
            pack_left<T>(packed, slopes);
        };

        rows.wait_full(blocks);
        if (first < end) {
            {
                float scores[kKeys / 8][4], slopes[kKeys / 8][4];
                keys.wait_full(count);
                wait_for_turn(group);
                multiply_values(slopes, count);
                multiply_keys(scores, count);
                give_turn(group);
                release_multiplied<S::kSlabs, 1>(values, count);
                group_wait<0>(scores, slopes);
                pack_slopes(scores, slopes);
            }
            for (first += kKeys, ++count; first < end; first += kKeys, ++count) {
                float scores[kKeys / 8][4], slopes[kKeys / 8][4];
                keys.wait_full(count);
                wait_for_turn(group);
                group_fence();
                add_to_gradient(count - 1);
                multiply_values(slopes, count);
                group_wait<S::kSlabs>(out, packed);
                keys.release(count - 1);
                group_fence();
                multiply_keys(scores, count);
                give_turn(group);
                release_multiplied<S::kSlabs, 1>(values, count);
                group_wait<0>(scores, slopes);
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
        gradients.store_with_frequencies(
            out, regime, static_cast<int>(p.head_dim),
            [&](int r) { return SharedRow<T, typename S::RowTile>{queries, r}; },
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
query_gradient_sm90_kernel(const LONGROPE_GRID_CONSTANT GradientLaunch launch) {
    using S = QueryShape<kHeadDim>;
    run_pipeline(
        [] {
            for (int group = 0; group < kGroups; ++group) S::rows(group).begin();
            S::keys().begin();
            S::values().begin();
        },
        [&] { produce_keys<T, S>(launch); }, [&](int group) { consume_keys<T, kHeadDim>(launch, group); });
}

template <class T, int kHeadDim>
void launch_query_gradient(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
                           int64_t key_tokens, Stream stream) {
    using S = QueryShape<kHeadDim>;
    const AttentionParams& p = params.forward;
    const Schedule schedule = schedule_of(p.batch * p.query_heads, (p.query_tokens + kRows - 1) / kRows,
                                          key_tokens * p.head_dim * 4 / (p.query_heads / p.key_heads));
    launch_gradients(query_gradient_sm90_kernel<T, kHeadDim>, params, scratch, schedule, S::kSharedBytes, kGroupRows,
                     S::kKeys, query_tokens, key_tokens, stream);
}

}  // namespace longrope
