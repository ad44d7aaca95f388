// Gradients of attention for Ampere and newer, up to head_dim 128; the same bits in every run. Above that:
// attention_backward_wide.cu.
//
//     P = 2^(S - lse)    dP = dO v^T    dS = P (dP - delta)    dq = dS k    dk = dS^T q    dv = P^T dO
//
// After delta = rowsum(dO * O) - dlse (attention_delta.cu), one block per 64 rows walks the keys for dq, and one block
// per 64 keys walks the rows (tokens, and within a token the query heads that share the key head) for dk and dv. S and
// dP are computed twice, which is two products in seven more than the least, and buys that no sum needs atomics or a
// pass over partial gradients: every one has one order. Queries and keys come rotated; dq and dk are rotated back from
// fp32 in the epilogue.
//
// In both, probabilities and their gradients go from the accumulators of one product to the left operand of the next
// without leaving the registers: the second block multiplies transposed, keys by rows.
//
// Operations: 14 head_dim per visible score on the tensor cores. Bytes: each block reads its 64 rows or keys once and
// the other side from L2. Bound by the tensor cores; copies are not overlapped with products within a block, two blocks
// to a multiprocessor overlap them.
#include "gradients.cuh"
#include "tile_copies.cuh"

namespace longrope {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = kBackwardRows, kKeys = kBackwardKeys;
static_assert(kRows == 16 * kWarps && kKeys == 16 * kWarps, "a warp takes 16 rows or keys");

// What a block keeps: two tiles of its own rows or keys and, after them, two that it walks; then what is known of rows.
// Its sums in fp32 take the place of all but the first tile.
template <int kHeadDim, int kWalked>
struct Shape {
    static constexpr int kSteps = kHeadDim / 16;
    using OwnTile = Tile<kRows, kHeadDim>;
    using WalkedTile = Tile<kWalked, kHeadDim>;
    using Keys = KeyCopies<WalkedTile, kThreads>;
    using Rows = RowCopies<WalkedTile, kThreads>;
    static constexpr int kSums = OwnTile::kBytes, kRowInfo = 2 * (OwnTile::kBytes + WalkedTile::kBytes);
    static constexpr int kSharedBytes = kRowInfo + kRows * 16;
    static_assert(kSums + kRows * kHeadDim * 4 <= kRowInfo && kWalked <= kRows, "the sums and the rows fit");
    static_assert(kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");

    LONGROPE_DEVICE static OwnTile own(int i) { return {static_cast<SharedAddress>(i * OwnTile::kBytes)}; }
    LONGROPE_DEVICE static WalkedTile walked(int i) {
        return {static_cast<SharedAddress>(2 * OwnTile::kBytes + i * WalkedTile::kBytes)};
    }
};

// Rows at a time for dk and dv: with 64 rows the registers of a head_dim of 96 or 128 spill.
template <int kHeadDim>
constexpr int kRowsWalked = kHeadDim > 64 ? 32 : 64;

// The keys that a row sees, its lse in units of log 2, and its delta. A row that sees nothing has an empty interval.
struct RowInfo {
    int low, high;
    float lse, delta;
};

LONGROPE_DEVICE RowInfo load_row_info(SharedAddress base, int row) {
    const Vec16 v = load_shared<Vec16>(base + 16 * row);
    return {static_cast<int>(v.word[0]), static_cast<int>(v.word[1]), as_float(v.word[2]), as_float(v.word[3])};
}

// P and dS of one score; `score` and `grad` become them.
LONGROPE_DEVICE void turn_into_gradients(float& score, float& grad, const RowInfo& row, int key,
                                         const ScoreScale& scale, float slope) {
    const float weight = probability(score, row.lse, scale, slope);
    const bool seen = key >= row.low && key < row.high;
    score = seen ? weight : 0.0f;
    grad = seen ? weight * (grad - row.delta) * slope : 0.0f;
}

// The operand that a warp's 16 rows of a tile are, and the one that 16 columns of its sums are.
template <class TileT>
LONGROPE_DEVICE auto rows_of_warp(TileT tile) {
    return [tile](uint32_t (&a)[4], int step) { load_left(a, tile, 16 * warp_index(), step); };
}
template <class T, int kTiles>
LONGROPE_DEVICE auto columns_of(const float (&sums)[kTiles][4]) {
    return [&sums](uint32_t (&a)[4], int j) { probabilities_left<T>(a, sums[2 * j], sums[2 * j + 1]); };
}

// Of a row that exists, or of none.
LONGROPE_DEVICE void store_row_info(const BackwardLaunch& launch, const Sequence& s, const RowMap& map,
                                    const RowPlace& row, bool exists, SharedAddress to) {
    const AttentionParams& p = launch.params.forward;
    Vec16 info{};
    if (exists) {
        const Interval seen = s.visible(p, row.token);
        const float* lse = s.lse(p, map.first_head + row.head, row.token);
        info = {{static_cast<uint32_t>(seen.low), static_cast<uint32_t>(seen.high), as_bits(load_global(lse) * kLog2E),
                 as_bits(load_global(static_cast<const float*>(launch.scratch.delta + (lse - p.lse))))}};
    }
    store_shared(to, info);
}

struct QueryGradientLaunch {
    BackwardLaunch launch;
    int64_t key_step, value_step;  // of the copies, in bytes
};

template <class T, int kHeadDim, int kWalked>
LONGROPE_KERNEL(kThreads)
query_gradient_kernel(const QueryGradientLaunch arguments) {
    const BackwardLaunch& launch = arguments.launch;
    using S = Shape<kHeadDim, kWalked>;
    const AttentionParams& p = launch.params.forward;
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t row_block = launch.scratch.row_blocks - 1 - block_index() % launch.scratch.row_blocks;
    const int64_t key_head = block_index() / launch.scratch.row_blocks % p.key_heads;
    const Sequence s(p, block_index() / launch.scratch.row_blocks / p.key_heads);
    const RowMap map(p, key_head);
    const int64_t first_row = row_block * kRows, left = s.query_count * map.group - first_row;
    if (left <= 0) return;
    const int count = static_cast<int>(left < kRows ? left : kRows);
    const auto queries = S::own(0), grads = S::own(1);
    const auto keys = S::walked(0), values = S::walked(1);

    copy_rows<T, kThreads>(launch.scratch.query, s, map, first_row, count, queries, head_dim);
    copy_rows<T, kThreads>(launch.params.grad_out, s, map, first_row, count, grads, head_dim);
    if (thread_index() < kRows)
        store_row_info(launch, s, map, RowPlace(map, first_row + thread_index()), thread_index() < count,
                       S::kRowInfo + 16 * thread_index());
    const Interval first_seen = s.visible(p, map.token(first_row));
    const Interval last_seen = s.visible(p, map.token(first_row + count - 1));
    const int begin = static_cast<int>(first_seen.low / kWalked * kWalked);
    const int end = static_cast<int>(last_seen.high < s.key_length ? last_seen.high : s.key_length);
    typename S::Keys next_keys(launch.scratch.key, s, key_head, begin), next_values(p.value, s, key_head, begin);
    const int length = static_cast<int>(s.key_length);
    const ScoreScale scale(p.scale, p.softcap);
    float out[2 * S::kSteps][4] = {};

    for (int first = begin; first < end; first += kWalked) {
        next_keys.start(keys, length - first, head_dim, arguments.key_step);
        next_values.start(values, length - first, head_dim, arguments.value_step);
        copy_async_commit();
        copy_async_wait<0>();
        block_sync();  // the tiles are there for all
        float scores[kWalked / 8][4] = {}, slopes[kWalked / 8][4] = {};
        multiply_rows<T, S::kSteps>(scores, keys, rows_of_warp(queries));
        multiply_rows<T, S::kSteps>(slopes, values, rows_of_warp(grads));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const RowInfo row = load_row_info(S::kRowInfo, 16 * warp_index() + lane_index() / 4 + 8 * r);
#pragma unroll
            for (int j = 0; j < kWalked / 8; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    turn_into_gradients(scores[j][2 * r + c], slopes[j][2 * r + c], row,
                                        first + 8 * j + lane_index() % 4 * 2 + c, scale, p.scale);
        }
        multiply_weights<T>(out, keys, 0, columns_of<T>(slopes));
        block_sync();  // the tiles are done with
    }
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();  // where no tile was visited, the queries are still arriving
    spread_sums(S::kSums, out, 16 * warp_index(), kHeadDim);
    block_sync();
    const Regime regime = regime_of(p.rotation, s.b);
    const auto position_of = [&](int r) { return s.query_position(p, map.token(first_row + r)); };
    rotate_rows<kThreads>(
        regime, head_dim, count, true, position_of, [&](int r) { return SharedFloatRow{S::kSums + r * kHeadDim * 4u}; },
        [&](int r) {
            const int64_t row = first_row + r;
            return GlobalRow<T>{s.query_row<T>(launch.params.grad_query, map.head(row), map.token(row))};
        });
    if (launch.scratch.query_part != nullptr)
        store_frequency_part<kThreads>(
            regime, S::kSums, kHeadDim, count,
            launch.scratch.query_part +
                ((s.b * p.key_heads + key_head) * launch.scratch.row_blocks + row_block) * regime.pairs,
            [&](int r) { return SharedRow<T, typename S::OwnTile>{queries, r}; }, position_of);
}

// Steps: of the walked rows' copies.
template <class Steps>
struct KeyGradientLaunch {
    BackwardLaunch launch;
    Steps copies;
    RowStep tile;  // from a row to that of the next tile
};

template <int kHeadDim>
using KeyShape = Shape<kHeadDim, kRowsWalked<kHeadDim>>;
template <int kHeadDim>
using RowCopySteps = typename KeyShape<kHeadDim>::Rows::Steps;

template <class T, int kHeadDim>
LONGROPE_KERNEL(kThreads)
key_gradient_kernel(const KeyGradientLaunch<RowCopySteps<kHeadDim>> arguments) {
    constexpr int kWalked = kRowsWalked<kHeadDim>;
    using S = KeyShape<kHeadDim>;
    const BackwardLaunch& launch = arguments.launch;
    const AttentionParams& p = launch.params.forward;
    const int head_dim = static_cast<int>(p.head_dim);
    const int64_t key_block = block_index() % launch.scratch.key_blocks;
    const int64_t key_head = block_index() / launch.scratch.key_blocks % p.key_heads;
    const Sequence s(p, block_index() / launch.scratch.key_blocks / p.key_heads);
    const RowMap map(p, key_head);
    const int first_key = static_cast<int>(key_block * kKeys);
    const int left = static_cast<int>(s.key_length) - first_key, count = left < kKeys ? left : kKeys;
    if (count <= 0) return;
    // Rows that see the block's keys: the intervals that they see only move right.
    const int64_t seeing_end = s.seeing(p, first_key + count - 1).high;
    const int64_t end = (seeing_end < s.query_count ? seeing_end : s.query_count) * map.group;
    const int64_t begin = s.seeing(p, first_key).low * map.group / kWalked * kWalked;
    const auto keys = S::own(0), values = S::own(1);
    const auto queries = S::walked(0), grads = S::walked(1);

    copy_keys<T, kThreads>(launch.scratch.key, s, key_head, first_key, keys, head_dim);
    copy_keys<T, kThreads>(p.value, s, key_head, first_key, values, head_dim);
    const ScoreScale scale(p.scale, p.softcap);
    float d_keys[2 * S::kSteps][4] = {}, d_values[2 * S::kSteps][4] = {};

    typename S::Rows next_rows(launch.scratch.query, launch.params.grad_out, s, map, begin);
    RowPlace known(map, begin + thread_index());
    for (int64_t first = begin; first < end; first += kWalked) {
        const int row_count = static_cast<int>(end - first < kWalked ? end - first : kWalked);
        next_rows.start(queries, grads, row_count, head_dim, arguments.copies);
        copy_async_commit();
        if (thread_index() < kWalked)
            store_row_info(launch, s, map, known, thread_index() < row_count, S::kRowInfo + 16 * thread_index());
        arguments.tile.advance(known);
        copy_async_wait<0>();
        block_sync();  // the tiles are there for all
        float scores[kWalked / 8][4] = {}, slopes[kWalked / 8][4] = {};
        multiply_rows<T, S::kSteps>(scores, queries, rows_of_warp(keys));
        multiply_rows<T, S::kSteps>(slopes, grads, rows_of_warp(values));
#pragma unroll
        for (int j = 0; j < kWalked / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowInfo row = load_row_info(S::kRowInfo, 8 * j + lane_index() % 4 * 2 + c);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    turn_into_gradients(scores[j][2 * r + c], slopes[j][2 * r + c], row,
                                        first_key + 16 * warp_index() + lane_index() / 4 + 8 * r, scale, p.scale);
            }
        multiply_weights<T>(d_values, grads, 0, columns_of<T>(scores));
        multiply_weights<T>(d_keys, queries, 0, columns_of<T>(slopes));
        block_sync();  // the tiles are done with
    }
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();

    const Regime regime = regime_of(p.rotation, s.b);
    const auto row_at = [&](const Operand& x, int r) {
        return GlobalRow<T>{row_of<T>(x, s.b, key_head, s.key_start + first_key + r)};
    };
    const auto position_of = [&](int r) { return s.key_position(p, first_key + r); };
    const SharedAddress sums = S::kSums;
    spread_sums(sums, d_values, 16 * warp_index(), kHeadDim);
    block_sync();
    for (int i = thread_index(); i < count * (head_dim / kChunk); i += kThreads) {
        const int r = i / (head_dim / kChunk), c = i % (head_dim / kChunk);
        row_at(launch.params.grad_value, r).store8(c, SharedFloatRow{sums + r * kHeadDim * 4}.load8(c));
    }
    block_sync();
    spread_sums(sums, d_keys, 16 * warp_index(), kHeadDim);
    block_sync();
    rotate_rows<kThreads>(
        regime, head_dim, count, true, position_of, [&](int r) { return SharedFloatRow{sums + r * kHeadDim * 4}; },
        [&](int r) { return row_at(launch.params.grad_key, r); });
    if (launch.scratch.key_part != nullptr)
        store_frequency_part<kThreads>(
            regime, sums, kHeadDim, count,
            launch.scratch.key_part +
                ((s.b * p.key_heads + key_head) * launch.scratch.key_blocks + key_block) * regime.pairs,
            [&](int r) { return SharedRow<T, typename S::OwnTile>{keys, r}; }, position_of);
}

template <class T, int kHeadDim, int kWalked>
void run_query_gradient(const BackwardLaunch& arguments, int64_t heads, Stream stream) {
    using S = Shape<kHeadDim, kWalked>;
    const QueryGradientLaunch all{arguments, S::Keys::step_of(arguments.scratch.key),
                                  S::Keys::step_of(arguments.params.forward.value)};
    launch(query_gradient_kernel<T, kHeadDim, kWalked>, arguments.scratch.row_blocks * heads, kThreads, S::kSharedBytes,
           all, stream);
}

template <class T, int kHeadDim>
void run(const BackwardLaunch& arguments, Stream stream) {
    using S = KeyShape<kHeadDim>;
    static_assert(blocks_that_fit(kSharedLimit + 1024, S::kSharedBytes) >= 2, "one block alone has no overlap");
    const AttentionParams& p = arguments.params.forward;
    const int64_t heads = p.batch * p.key_heads, group = p.query_heads / p.key_heads;
    // Two blocks to a multiprocessor: at head_dim 128 that takes smaller tiles where there are 100 KB.
    if constexpr (kHeadDim <= 96)
        run_query_gradient<T, kHeadDim, 64>(arguments, heads, stream);
    else if (blocks_that_fit(multiprocessor_shared(), Shape<kHeadDim, 64>::kSharedBytes) >= 2)
        run_query_gradient<T, kHeadDim, 64>(arguments, heads, stream);
    else
        run_query_gradient<T, kHeadDim, 32>(arguments, heads, stream);
    using Steps = RowCopySteps<kHeadDim>;
    const KeyGradientLaunch<Steps> all{arguments, Steps(arguments.scratch.query, arguments.params.grad_out, group),
                                       RowStep(kRowsWalked<kHeadDim>, group)};
    launch(key_gradient_kernel<T, kHeadDim>, arguments.scratch.key_blocks * heads, kThreads, S::kSharedBytes, all,
           stream);
}

template <class T>
void run_of_width(const BackwardLaunch& arguments, Stream stream) {
    const int64_t head_dim = arguments.params.forward.head_dim;
    if (head_dim <= 32) return run<T, 32>(arguments, stream);
    if (head_dim <= 64) return run<T, 64>(arguments, stream);
    if (head_dim <= 96) return run<T, 96>(arguments, stream);
    run<T, 128>(arguments, stream);
}

}  // namespace

void attention_backward_sm80(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    attention_delta(params, scratch, stream);
    const BackwardLaunch arguments{params, scratch};
    if (params.forward.head_dim > 128) return attention_backward_wide_sm80(arguments, stream);
    if (params.forward.dtype == Dtype::kFloat16) return run_of_width<Half>(arguments, stream);
    run_of_width<BFloat16Bits>(arguments, stream);
}

}  // namespace longrope
