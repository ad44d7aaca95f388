// Attention forward for Ampere and newer: cp.async, ldmatrix, mma.sync; probabilities never leave the registers.
//
//     S = q k^T     m' = max(m, rowmax S)     P = 2^(S - m')     l = l 2^(m - m') + rowsum P     O = O 2^(m - m') + P v
//
// A block takes 128 rows of one (sequence, key head), over tokens and the query heads that share the key head: 4 warps
// of 32 rows, above head_dim 128 8 warps of 16. It rotates its queries into shared memory once and walks the tiles of
// 64 (or 32) keys that its rows see. Keys come rotated (prepare_keys: one pass over the keys, a part in a thousand of
// the work where there are many rows).
//
// The copy of a tile's values runs under the product with its keys, the copy of the next keys under the softmax and the
// product with the values: one buffer of each is enough, and 8 warps fit on a multiprocessor, in two blocks or in one.
//
// Operations: 4 head_dim per visible score on the tensor cores (at head_dim 128 a warp's tile of 32 rows and 32 keys is
// 1,024 cycles of an A100's quarter), about 12 fp32 instructions and one exp2 per score. Bytes: queries and output
// once; keys and values once per row block, from L2; a warp reads its queries, keys and values from shared memory for
// every tile, 24 KB at head_dim 128, for which a multiprocessor takes three quarters of the time its tensor cores take.
// Bound by the tensor cores; at head_dim 64 as much by exp2 (16 a cycle).
//
// A row's bits depend on its own interval of keys alone: tiles are counted from a sequence's first key, and a tile of
// which a row sees nothing multiplies its sums by 1 and adds 0.
#include "../kernels.h"
#include "../output.cuh"
#include "../queries.cuh"
#include "../softmax.cuh"
#include "tile_copies.cuh"

namespace longrope {
namespace {

constexpr int kRows = 128;

template <int kHeadDim, int kTileKeys>
struct Shape {
    // Two row tiles a warp halve the reads of keys and values from shared memory; at 256 the registers hold one.
    static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;
    static constexpr int kWarps = kRows / (16 * kRowTiles), kThreads = 32 * kWarps;
    static constexpr int kKeys = kTileKeys, kSteps = kHeadDim / 16;
    using QueryTile = Tile<kRows, kHeadDim>;
    using KeyTile = Tile<kKeys, kHeadDim>;
    using Copies = KeyCopies<KeyTile, kThreads>;
    static constexpr int kSeen = QueryTile::kBytes + 2 * KeyTile::kBytes;
    static constexpr int kSharedBytes = kSeen + kRows * 8;

    // Where the interval of keys that a row sees is kept: low and high, int32.
    LONGROPE_DEVICE static SharedAddress seen_of(int row) { return kSeen + row * 8; }
};

struct ForwardLaunch {
    AttentionParams params;
    int64_t key_step, value_step;  // of the copies, in bytes
};

// What a block works on.
struct Work {
    int64_t key_head, b;
    int64_t first_row;  // of the sequence's rows

    LONGROPE_DEVICE explicit Work(const AttentionParams& p) {
        const int64_t row_blocks = (p.query_tokens * (p.query_heads / p.key_heads) + kRows - 1) / kRows;
        // The last rows see the most keys under a causal mask: they go first, and short blocks fill the end.
        first_row = (row_blocks - 1 - block_index() % row_blocks) * kRows;
        key_head = block_index() / row_blocks % p.key_heads;
        b = block_index() / row_blocks / p.key_heads;
    }
    // Rows of the block that exist; none, or less: the block has nothing to do.
    LONGROPE_DEVICE int count(const Sequence& s, const RowMap& map) const {
        const int64_t left = s.query_count * map.group - first_row;
        return static_cast<int>(left < kRows ? left : kRows);
    }
};

// Stores the block's rows by way of each warp's own rows of the query tile. What it needs to know is worked out anew:
// registers are short in the loop before.
template <class T, class S>
LONGROPE_DEVICE void store_rows(const AttentionParams& p, float (&out)[S::kRowTiles][2 * S::kSteps][4],
                                const float (&top)[S::kRowTiles][2], const float (&total)[S::kRowTiles][2]) {
    const Work work(p);
    const Sequence s(p, work.b);
    const RowMap map(p, work.key_head);
    const int count = work.count(s, map), warp_row = warp_index() * 16 * S::kRowTiles;
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i)
        store_16_rows<T>(p, s, map, work.first_row, count, typename S::QueryTile{0}, warp_row + 16 * i, out[i], top[i],
                         total[i]);
}

template <class T, int kHeadDim, int kTileKeys>
LONGROPE_KERNEL((Shape<kHeadDim, kTileKeys>::kThreads))
attention_forward_kernel(const ForwardLaunch launch) {
    const AttentionParams& p = launch.params;
    using S = Shape<kHeadDim, kTileKeys>;
    constexpr int kRowTiles = S::kRowTiles, kSteps = S::kSteps, kKeys = S::kKeys, kKeySteps = kKeys / 16;
    constexpr int kThreads = S::kThreads;
    const Work work(p);
    const Sequence s(p, work.b);
    const RowMap map(p, work.key_head);
    const int count = work.count(s, map);
    if (count <= 0 || decodes(p, s)) return;

    const typename S::QueryTile queries{0};
    const typename S::KeyTile keys{S::QueryTile::kBytes}, values{keys.base + S::KeyTile::kBytes};
    // Rows see intervals that only move right: those of the first and the last row bound what the block visits.
    const Interval first_seen = s.visible(p, map.token(work.first_row));
    const Interval last_seen = s.visible(p, map.token(work.first_row + count - 1));
    const int begin = static_cast<int>(first_seen.low / kKeys * kKeys);
    const int end = static_cast<int>(last_seen.high < s.key_length ? last_seen.high : s.key_length);
    // Tiles within these are seen whole by every row.
    const int whole_begin = static_cast<int>(last_seen.low);
    const int whole_end = count < kRows ? 0 : static_cast<int>(first_seen.high);
    const int head_dim = static_cast<int>(p.head_dim), length = static_cast<int>(s.key_length);
    typename S::Copies next_keys(p.key, s, work.key_head, begin), next_values(p.value, s, work.key_head, begin);
    if (begin < end) next_keys.start(keys, length - begin, head_dim, launch.key_step);
    copy_async_commit();
    load_queries<T, kThreads>(p, s, map, work.first_row, count, queries);
    for (int r = thread_index(); r < kRows; r += kThreads) {
        const Interval seen = r < count ? s.visible(p, map.token(work.first_row + r)) : Interval{0, 0};
        store_shared(S::seen_of(r), Vec8{static_cast<uint32_t>(seen.low), static_cast<uint32_t>(seen.high)});
    }

    const int warp_row = warp_index() * 16 * kRowTiles;
    float out[kRowTiles][2 * kSteps][4] = {};
    float top[kRowTiles][2], total[kRowTiles][2] = {};
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) top[i][0] = top[i][1] = -infinity();
    const ScoreScale scale(p.scale, p.softcap);

    for (int first = begin; first < end; first += kKeys) {
        copy_async_wait<0>();
        block_sync();  // the keys are there for all, and the last tile's values are done with
        next_values.start(values, length - first, head_dim, launch.value_step);
        copy_async_commit();

        float scores[kRowTiles][2 * kKeySteps][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t q[kRowTiles][4];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) load_left(q[i], queries, warp_row + 16 * i, step);
#pragma unroll
            for (int j = 0; j < kKeySteps; ++j) {
                uint32_t both[4], k[2];
                load_right(both, keys, 16 * j, step);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    right_half(k, both, half);
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) multiply_add<T>(scores[i][2 * j + half], q[i], k);
                }
            }
        }

        copy_async_wait<0>();
        block_sync();  // the values are there for all, and the keys are done with
        if (first + kKeys < end) next_keys.start(keys, length - first - kKeys, head_dim, launch.key_step);
        copy_async_commit();

        const bool masked = first < whole_begin || first + kKeys > whole_end;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            if (scale.capped()) cap_scores(scores[i], scale);
            if (masked)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const Vec8 seen = load_shared<Vec8>(S::seen_of(warp_row + 16 * i + 8 * r + lane_index() / 4));
                    mask_scores(scores[i], r, static_cast<int>(seen.word[0]) - first,
                                static_cast<int>(seen.word[1]) - first);
                }
            float keep[2];
            softmax_step(scores[i], scale, top[i], total[i], keep);
            rescale(out[i], keep);
        }
#pragma unroll
        for (int j = 0; j < kKeySteps; ++j) {
            uint32_t weights[kRowTiles][4];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i)
                probabilities_left<T>(weights[i], scores[i][2 * j], scores[i][2 * j + 1]);
#pragma unroll
            for (int n = 0; n < kSteps; ++n) {
                uint32_t both[4], v[2];
                load_right_transposed(both, values, 16 * j, n);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    right_half(v, both, half);
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) multiply_add<T>(out[i][2 * n + half], weights[i], v);
                }
            }
        }
    }
    block_sync();  // where no tile was visited, the queries are still being written
    store_rows<T, S>(p, out, top, total);
}

template <class T, int kHeadDim, int kTileKeys>
void run(const AttentionParams& p, Stream stream) {
    using S = Shape<kHeadDim, kTileKeys>;
    const int64_t rows = p.query_tokens * (p.query_heads / p.key_heads);
    launch(attention_forward_kernel<T, kHeadDim, kTileKeys>, (rows + kRows - 1) / kRows * p.key_heads * p.batch,
           S::kThreads, S::kSharedBytes, ForwardLaunch{p, S::Copies::step_of(p.key), S::Copies::step_of(p.value)},
           stream);
}

template <class T>
void run_of_width(const AttentionParams& p, Stream stream) {
    if (p.head_dim <= 32) return run<T, 32, 64>(p, stream);
    if (p.head_dim <= 64) return run<T, 64, 64>(p, stream);
    // With 64 keys the registers of a head_dim of 96 or 128 spill.
    if (p.head_dim <= 96) return run<T, 96, 32>(p, stream);
    if (p.head_dim <= 128) return run<T, 128, 32>(p, stream);
    static_assert(Shape<256, 32>::kSharedBytes <= kSharedLimit, "the tiles do not fit sm_86");
    const bool wide = blocks_that_fit(multiprocessor_shared(), Shape<256, 64>::kSharedBytes) > 0;
    return wide ? run<T, 256, 64>(p, stream) : run<T, 256, 32>(p, stream);
}

}  // namespace

void attention_forward_sm80(const AttentionParams& params, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_of_width<Half>(params, stream);
    return run_of_width<BFloat16Bits>(params, stream);
}

}  // namespace longrope
