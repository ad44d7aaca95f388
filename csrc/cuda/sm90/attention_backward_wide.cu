// Gradients of attention for Hopper at head_dim above 128, up to 256; the same bits in every run.
//
// dq is the kernel of the narrower ones (query_gradient.cuh), 64 keys at a time. For dk and dv it cannot be theirs:
// 64 x 256 sums of each take all 256 registers of a warpgroup's threads. So two warpgroups share 64 keys, as two warps
// share 16 in sm80/attention_backward_wide.cu, and walk 64 queries at a time:
//
//     group 0, the scorer | S^T = k q^T |     P = 2^(S - lse)   W = P slope     | dv += P^T dO |
//     group 1, the sloper               | dP^T = v dO^T |      dS = W (dP - delta)             | dk += dS^T q |
//
// `slope` is what the softcap leaves of the score's. W goes through shared memory in fp32, 16 bytes a lane for 8
// columns. The four products of a tile are issued in this order, which turns at named barriers keep; they also say that
// W is there, or has been taken. A group waits for its own products: what it does with its scores takes less time than
// the product of the other group that runs meanwhile. So a stage of queries and grad_out is read for one tile's time,
// and the next is copied in the same.
//
// A thread has 128 sums and 32 scores. The first columns of its keys or values stay in registers besides, as many as
// there are: with both operands in shared memory a product of 64 columns reads as long as it takes, with one half of
// that.
//
// In cycles of a multiprocessor as in attention_backward.cu:
//
//                               tensor cores   shared memory: wgmma, W, copies   exp2, 16 a cycle   from L2
//   dq, 128 rows, 64 keys              3,072            2,560 +   0 + 512                     512   64 KB, 21 a cycle
//   dk and dv, 64 keys, 64 rows        2,048            1,408 + 256 + 512                     256   64 KB, 30 a cycle
//
// Shared memory is as busy as the tensor cores; dk and dv may as well wait for L2. For 128 x 128 that is 14,848 cycles,
// in which sm80/attention_backward_wide.cu, whose operands are read once for 16 rows and not for 64, keeps shared
// memory busy for 39,360.
#include "key_gradient.cuh"
#include "query_gradient.cuh"

namespace longrope {
namespace {

constexpr int kHeadDim = 256;

struct WideKeyShape {
    static constexpr int kKeyTiles = 1, kRows = 64, kStages = 2;
    static constexpr int kSteps = kHeadDim / 16, kRowSteps = kRows / 16;
    static constexpr int kHeldSteps = 4;  // of the left operand, in registers: with more ptxas spills
    using KeyTile = WideTile<kGroupRows, kHeadDim>;
    using RowTile = WideTile<kRows, kHeadDim>;
    using Keys = Ring<TilePair<KeyTile>, 1>;        // keys and values
    using Rows = Ring<TilePair<RowTile>, kStages>;  // queries and grad_out
    static constexpr int kRowsAt = Keys::kTileBytes, kExchangeAt = kRowsAt + Rows::kTileBytes;
    // A stage's {lse in units of log 2, delta times the scale}, by row.
    static constexpr int kKnownAt = kExchangeAt + kRows / 8 * kGroupThreads * 16;
    static constexpr int kNotesAt = kKnownAt + kStages * kRows * 8;
    static constexpr int kBarriersAt = kNotesAt + kGroups * kGroupThreads * QueryWalk::kBytes;
    static constexpr int kRowBarriersAt = kBarriersAt + Keys::kBarrierBytes;
    static constexpr int kSharedBytes = kRowBarriersAt + Rows::kBarrierBytes;
    static_assert(kSharedBytes <= 227 << 10, "the tiles do not fit a multiprocessor");

    LONGROPE_DEVICE static Keys keys(int) { return {0, kBarriersAt}; }
    LONGROPE_DEVICE static Rows rows() { return {kRowsAt, kRowBarriersAt}; }
    LONGROPE_DEVICE static SharedAddress known(int count, int row) {
        return kKnownAt + (Rows::stage(count) * kRows + row) * 8;
    }
    // Where a lane of the scorer leaves the weights of tile j of 8 columns, for the same lane of the sloper.
    LONGROPE_DEVICE static SharedAddress weights(int j) {
        return kExchangeAt + (j * kGroupThreads + thread_index() % kGroupThreads) * 16;
    }
};

// The scorer's part of a tile: P in the place of the scores, and the weights to the sloper.
template <bool kCapped, int kTiles>
LONGROPE_DEVICE void score_tiles(float (&scores)[kTiles][4], const ScoreScale& scale, int at) {
    using S = WideKeyShape;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const Float4 known = load_shared<Float4>(S::known(at, 8 * j + lane_index() % 4 * 2));
        Float4 weights;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float slope = 1.0f;
            scores[j][c] = probability<kCapped>(scores[j][c], known.at[c % 2 * 2], scale, slope);
            weights.at[c] = scores[j][c] * slope;
        }
        store_shared(S::weights(j), weights);
    }
}

// The sloper's: dS in the place of dP.
template <int kTiles>
LONGROPE_DEVICE void slope_tiles(float (&slopes)[kTiles][4], float factor, int at) {
    using S = WideKeyShape;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const Float4 known = load_shared<Float4>(S::known(at, 8 * j + lane_index() % 4 * 2));
        const Float4 weights = load_shared<Float4>(S::weights(j));
#pragma unroll
        for (int c = 0; c < 4; ++c) slopes[j][c] = weights.at[c] * (slopes[j][c] * factor - known.at[c % 2 * 2 + 1]);
    }
}

template <class T>
LONGROPE_DEVICE void consume_queries_by_role(const GradientLaunch& launch, int group) {
    using S = WideKeyShape;
    const AttentionParams& p = launch.params.forward;
    const bool scorer = group == 0;
    const auto rows = S::rows();
    const auto keys = S::keys(0);
    QueryWalk walk(S::kNotesAt);
    int count = 0, blocks = 0;  // of tiles and of blocks of keys so far

    each_tile(launch.schedule, [&](int32_t tile) {
        {
            const KeyWork<S::kKeyTiles> work(p, launch.schedule, tile);
            if (work.count == 0) return;
            walk.begin(p, work, 0, S::kRows);
        }
        const auto own = keys.tile(blocks).of(scorer);  // keys or values, and in the end the sums
        float out[kHeadDim / 8][4] = {};                // of dv or dk
        uint32_t held[S::kHeldSteps][4], packed[S::kRowSteps][4];
        keys.wait_full(blocks);
        if (walk.left > 0) {
#pragma unroll
            for (int step = 0; step < S::kHeldSteps; ++step)
                load_left(held[step], own, warp_index() % kGroupWarps * 16, step);
        }
        for (; walk.left > 0; ++count, --walk.left) {
            float x[S::kRows / 8][4];  // S or dP, then P or dS
            rows.wait_full(count);
            {
                const auto a = typename S::KeyTile{anew(own.base)}.by_columns();
                const auto b = rows.tile(count).of(scorer).by_columns();
                wait_for_turn(group);
                group_fence();
#pragma unroll
                for (int step = 0; step < S::kHeldSteps; ++step)
                    group_multiply_add<T>(x, held[step], advance(b, S::RowTile::columns_at(step)), step > 0);
#pragma unroll
                for (int step = S::kHeldSteps; step < S::kSteps; ++step)
                    group_multiply_add<T>(x, advance(a, S::KeyTile::columns_at(step)),
                                          advance(b, S::RowTile::columns_at(step)), step > 0);
                group_commit();
                give_turn(group);
                group_wait<0>(x, held);
            }
            if (!scorer) wait_for_turn(group);  // the weights are there
            if (!scorer)
                slope_tiles(x, p.scale, count);
            else if (launch.scale.capped())
                score_tiles<true>(x, launch.scale, count);
            else
                score_tiles<false>(x, launch.scale, count);
            walk.seeing.mask(walk.first, x);
            pack_left<T>(packed, x);
            walk.move(S::kRows);

            const MatrixDescriptor b = rows.tile(count).of(!scorer).by_rows();
            if (scorer) wait_for_turn(group);
            group_fence();
#pragma unroll
            for (int j = 0; j < S::kRowSteps; ++j)
                group_multiply_add<T, true>(out, packed[j], advance(b, S::RowTile::rows_at(j)), true);
            group_commit();
            give_turn(group);
            group_wait<0>(out, packed);
            rows.release(count);
        }
        // No warp of the group reads its keys or values any more: the last turn came after.
        // Worked out anew: registers are short in the loop before.
        const KeyWork<S::kKeyTiles> work(p, launch.schedule, tile);
        const int64_t place =
            (work.s.b * p.key_heads + work.head) * launch.scratch.key_blocks + work.first / kGroupRows;
        double* part = launch.scratch.key_part;
        const Operand& to = scorer ? launch.params.grad_value : launch.params.grad_key;
        const auto row_at = [&](const Operand& x, int r) {
            return GlobalRow<T>{row_of<T>(x, work.s.b, work.head, work.s.key_start + work.first + r)};
        };
        const GradientRows<typename S::KeyTile> gradients{own, group, work.count};
        gradients.store_with_frequencies(
            out, scorer ? Regime{} : regime_of(p.rotation, work.s.b), static_cast<int>(p.head_dim),
            [&](int r) { return row_at(launch.scratch.key, r); },
            scorer || part == nullptr ? nullptr : part + place * p.rotation.pairs,
            [&](int r) { return work.s.key_position(p, work.first + r); }, [&](int r) { return row_at(to, r); });
        proxy_fence();
        keys.release(blocks);
        ++blocks;
    });
}

template <class T>
LONGROPE_KERNEL(kThreads)
wide_key_gradient_sm90_kernel(const LONGROPE_GRID_CONSTANT GradientLaunch launch) {
    using S = WideKeyShape;
    run_pipeline(
        [] {
            S::keys(0).begin();
            S::rows().begin(2);  // the copies, and what is known of the rows
        },
        [&] { produce_queries<T, S>(launch); }, [&](int group) { consume_queries_by_role<T>(launch, group); });
}

template <class T>
void run(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
         int64_t key_tokens, Stream stream) {
    launch_query_gradient<T, kHeadDim>(params, scratch, query_tokens, key_tokens, stream);
    launch_key_gradient<WideKeyShape>(wide_key_gradient_sm90_kernel<T>, params, scratch, query_tokens, key_tokens,
                                      stream);
}

}  // namespace

void attention_backward_wide_sm90(const AttentionBackwardParams& params, const BackwardScratch& scratch,
                                  int64_t query_tokens, int64_t key_tokens, Stream stream) {
    if (params.forward.dtype == Dtype::kFloat16) return run<Half>(params, scratch, query_tokens, key_tokens, stream);
    run<BFloat16Bits>(params, scratch, query_tokens, key_tokens, stream);
}

}  // namespace longrope
