// Attention forward for Hopper: bulk copies, wgmma, a producer and two consumer warpgroups; the sums of
// sm80/attention_forward.cu.
//
// The grid is persistent (schedule.cuh). A block takes 128 rows of one (sequence, key head). Its producer warp keeps
// two stages of keys and values coming, by bulk copies that land swizzled; keys were rotated before (prepare_keys).
// Each consumer rotates its 64 queries into shared memory and walks the tiles:
//
//     consumer 0   S(i) = q k(i) | O += P v(i-1) |        softmax of S(i)       |
//     consumer 1                                 | S(i) = q k(i) | O += P v(i-1) |      softmax of S(i)
//
// Both products of a step are issued together and in turn (named barriers), so that one group's softmax runs under the
// other's products, and under its own product with the values. P stays in registers, as the left operand of that
// product.
//
// Operations at head_dim 128, for a tile of 128 rows and 128 keys: 4 x 128 x 128 x 128 on the tensor cores, at 4,096 a
// cycle and multiprocessor 2,048 cycles; 16,384 exp2, at 16 a cycle 1,024; about 10 fp32 instructions a score, 1,280 at
// 128 a cycle. Bytes: 64 KB of keys and values from L2 a tile. wgmma reads its right operand once a warpgroup and 64
// rows, and q besides. Bound by the tensor cores where the softmax stays hidden; at head_dim 64 exp2 takes as long as
// they do (1,024 cycles each).
//
// A row's bits depend on its own interval of keys alone, as in sm80/attention_forward.cu. Values past a sequence's end
// would reach it as 0 x NaN, and there the next sequence of the batch begins: the last tile of values is copied row by
// row, with zeros from its end on.
#include "../kernels.h"
#include "../output.cuh"
#include "../queries.cuh"
#include "../softmax.cuh"
#include "pipeline.cuh"

namespace longrope {
namespace {

template <int kHeadDim>
struct Shape {
    static constexpr int kKeys = kHeadDim <= 128 ? 128 : 64, kStages = 2;
    static constexpr int kSteps = kHeadDim / 16, kKeySteps = kKeys / 16;
    static constexpr int kColumns = (kHeadDim + 63) / 64 * 64;
    using QueryTile = WideTile<kGroupRows, kColumns>;
    using KeyTile = WideTile<kKeys, kColumns>;
    static constexpr int kKeysAt = kGroups * QueryTile::kBytes, kValuesAt = kKeysAt + kStages * KeyTile::kBytes;
    static constexpr int kBarriersAt = kValuesAt + kStages * KeyTile::kBytes;
    static constexpr int kSharedBytes = kBarriersAt + 4 * kStages * 8;
    static_assert(kSharedBytes <= 227 << 10, "the tiles do not fit a multiprocessor");

    LONGROPE_DEVICE static QueryTile queries(int group) { return {group * QueryTile::kBytes + 0u}; }
};

template <class S>
struct Rings {
    using Of = Ring<typename S::KeyTile, S::kStages>;
    Of keys{S::kKeysAt, S::kBarriersAt}, values{S::kValuesAt, S::kBarriersAt + 16 * S::kStages};
};

struct ForwardLaunch {
    TensorMap keys, values;  // [batch, key_heads, tokens, head_dim]; dimensions of stride 0 have one element
    AttentionParams params;
    Schedule schedule;
};

// What a block works on in a round.
template <class S>
struct Work {
    int64_t key_head;
    Sequence s;
    RowMap map;
    int64_t first_row;  // of the sequence's rows
    int64_t count;      // rows that exist, none or less: nothing to do

    LONGROPE_DEVICE Work(const AttentionParams& p, const Schedule::Place& place)
        : key_head(place.pair % p.key_heads),
          s(p, place.pair / p.key_heads),
          map(p, key_head),
          first_row(place.row_block * kRows),
          count(s.query_count * map.group - first_row) {
        if (count > kRows) count = kRows;
        if (decodes(p, s)) count = 0;
    }
    LONGROPE_DEVICE int rows_of(int group) const {
        const int64_t left = count - group * kGroupRows;
        return static_cast<int>(left < 0 ? 0 : left < kGroupRows ? left : kGroupRows);
    }
    // Keys that any of the rows sees, from a multiple of the tile on.
    LONGROPE_DEVICE Interval keys(const AttentionParams& p) const {
        if (count <= 0) return {0, 0};
        const Interval first = s.visible(p, map.token(first_row)),
                       last = s.visible(p, map.token(first_row + count - 1));
        return {first.low / S::kKeys * S::kKeys, last.high < s.key_length ? last.high : s.key_length};
    }
};

template <class T, class S>
LONGROPE_DEVICE void produce(const ForwardLaunch& launch) {
    const AttentionParams& p = launch.params;
    const Rings<S> rings;
    int count = 0;  // of tiles so far
    each_tile(launch.schedule, [&](int32_t tile) {
        const Work<S> work(p, launch.schedule.at(tile));
        const Interval keys = work.keys(p);
        for (int64_t first = keys.low; first < keys.high; first += S::kKeys, ++count) {
            const int64_t left = work.s.key_length - first, token = work.s.key_start + first;
            const auto bring = [&](const TensorMap& map, const Operand& from, const auto& ring) {
                ring.expect(count);
                copy_bulk(map, from, work.s.b, work.key_head, token, ring.tile(count), ring.full(count));
            };
            rings.keys.wait_free(count);
            if (lane_index() == 0) bring(launch.keys, p.key, rings.keys);
            rings.values.wait_free(count);
            if (left < S::kKeys) {
                copy_rows<T>(rings.values.tile(count), left, p.value, work.s.b, work.key_head, token, p.head_dim);
                rings.values.fill_copied(count);
            } else if (lane_index() == 0) {
                bring(launch.values, p.value, rings.values);
            }
        }
    });
}

template <class T, int kHeadDim>
LONGROPE_DEVICE void consume(const ForwardLaunch& launch, int group) {
    using S = Shape<kHeadDim>;
    constexpr int kKeys = S::kKeys, kKeySteps = S::kKeySteps;
    const AttentionParams& p = launch.params;
    const Rings<S> rings;
    const typename S::QueryTile queries = S::queries(group);
    const int warp_row = warp_index() % 4 * 16;
    const ScoreScale scale(p.scale, p.softcap);
    int count = 0;  // of tiles so far

    each_tile(launch.schedule, [&](int32_t tile) {
        // Keys that the group visits, those that every row of it sees, and those that the thread's two rows see.
        int first, end, whole_begin = 0, whole_end = 0, low[2], high[2];
        {
            const Work<S> work(p, launch.schedule.at(tile));
            if (work.count <= 0) return;
            const int64_t group_row = work.first_row + group * kGroupRows;
            const int rows = work.rows_of(group);
            const Interval keys = work.keys(p);
            first = static_cast<int>(keys.low);
            end = static_cast<int>(keys.high);
            if (rows == kGroupRows) {
                whole_begin = static_cast<int>(work.s.visible(p, work.map.token(group_row + kGroupRows - 1)).low);
                whole_end = static_cast<int>(work.s.visible(p, work.map.token(group_row)).high);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = warp_row + 8 * r + lane_index() / 4;
                const Interval seen = row < rows ? work.s.visible(p, work.map.token(group_row + row)) : Interval{0, 0};
                low[r] = static_cast<int>(seen.low);
                high[r] = static_cast<int>(seen.high);
            }
            group_sync(group);  // the rows of the tile before have left the query tile
            load_queries<T, kGroupThreads>(p, work.s, work.map, group_row, rows, queries,
                                           thread_index() % kGroupThreads);
            proxy_fence();  // and the barrier of the first turn shows them to the group
        }

        float scores[kKeys / 8][4], out[kHeadDim / 8][4] = {};
        uint32_t weights[kKeySteps][4];
        float top[2] = {-infinity(), -infinity()}, total[2] = {}, keep[2];
        const auto multiply_keys = [&](int at) {
            const MatrixDescriptor q = queries.by_columns(), k = rings.keys.tile(at).by_columns();
#pragma unroll
            for (int step = 0; step < S::kSteps; ++step)
                group_multiply_add<T>(scores, advance(q, S::QueryTile::columns_at(step)),
                                      advance(k, S::KeyTile::columns_at(step)), step > 0);
            group_commit();
        };
        const auto multiply_values = [&](int at) {
            const MatrixDescriptor v = rings.values.tile(at).by_rows();
#pragma unroll
            for (int j = 0; j < kKeySteps; ++j)
                group_multiply_add<T, true>(out, weights[j], advance(v, S::KeyTile::rows_at(j)), true);
            group_commit();
        };
        const auto softmax = [&](int first) {
            if (scale.capped()) cap_scores(scores, scale);
            if (first < whole_begin || first + kKeys > whole_end)
#pragma unroll
                for (int r = 0; r < 2; ++r) mask_scores(scores, r, low[r] - first, high[r] - first);
            softmax_step(scores, scale, top, total, keep);
        };
        const auto pack_weights = [&] {
#pragma unroll
            for (int j = 0; j < kKeySteps; ++j) probabilities_left<T>(weights[j], scores[2 * j], scores[2 * j + 1]);
        };

        if (first < end) {
            rings.keys.wait_full(count);
            wait_for_turn(group);
            group_fence();
            multiply_keys(count);
            give_turn(group);
            group_wait<0>(scores);
            rings.keys.release(count);
            softmax(first);
            pack_weights();
            for (first += kKeys, ++count; first < end; first += kKeys, ++count) {
                rings.keys.wait_full(count);
                rings.values.wait_full(count - 1);
                wait_for_turn(group);
                group_fence();
                multiply_keys(count);
                multiply_values(count - 1);
                give_turn(group);
                group_wait<1>(scores);
                rings.keys.release(count);
                softmax(first);
                group_wait<0>(out, weights);
                rings.values.release(count - 1);
#pragma unroll
                for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
                    for (int c = 0; c < 4; ++c) out[n][c] *= keep[c / 2];
                pack_weights();
            }
            rings.values.wait_full(count - 1);
            group_fence();
            multiply_values(count - 1);
            group_wait<0>(out, weights);
            rings.values.release(count - 1);
        }
        group_sync(group);  // no warp of the group reads the query tile any more
        // Worked out anew: registers are short in the loop before.
        const Work<S> work(p, launch.schedule.at(tile));
        store_16_rows<T>(p, work.s, work.map, work.first_row + group * kGroupRows, work.rows_of(group), queries,
                         warp_row, out, top, total);
    });
}

template <class T, int kHeadDim>
LONGROPE_KERNEL(kThreads)
attention_forward_sm90_kernel(const LONGROPE_GRID_CONSTANT ForwardLaunch launch) {
    using S = Shape<kHeadDim>;
    run_pipeline(
        [] {
            const Rings<S> rings;
            rings.keys.begin();
            rings.values.begin();
        },
        [&] { produce<T, S>(launch); }, [&](int group) { consume<T, kHeadDim>(launch, group); });
}

template <class T, int kHeadDim>
void run(const AttentionParams& p, int64_t key_tokens, Stream stream) {
    using S = Shape<kHeadDim>;
    const int64_t rows = p.query_tokens * (p.query_heads / p.key_heads);
    const Schedule schedule =
        schedule_of(p.batch * p.key_heads, (rows + kRows - 1) / kRows, key_tokens * p.head_dim * 4);
    if (schedule.tiles() == 0) return;
    const auto map = [&](const Operand& x) { return operand_map(x, p, p.key_heads, key_tokens, S::kKeys); };
    const ForwardLaunch forward{map(p.key), map(p.value), p, schedule};
    launch(attention_forward_sm90_kernel<T, kHeadDim>, blocks_of(schedule), kThreads, S::kSharedBytes, forward, stream);
}

template <class T>
void run_of_width(const AttentionParams& p, int64_t key_tokens, Stream stream) {
    if (p.head_dim <= 64) return run<T, 64>(p, key_tokens, stream);
    if (p.head_dim <= 96) return run<T, 96>(p, key_tokens, stream);
    if (p.head_dim <= 128) return run<T, 128>(p, key_tokens, stream);
    return run<T, 256>(p, key_tokens, stream);
}

}  // namespace

void attention_forward_sm90(const AttentionParams& params, int64_t key_tokens, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_of_width<Half>(params, key_tokens, stream);
    run_of_width<BFloat16Bits>(params, key_tokens, stream);
}

}  // namespace longrope
