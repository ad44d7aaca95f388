// The sum of the partial results of split keys.
//
// A block takes one row: it finds the largest lse of all splits, then its eight warps add up every eighth split each,
// and their sums are added in the order of the warps. Which warp takes a split, and in which order, depends on the
// split's number alone, and splits that a row does not see are skipped: what a sequence shares its batch with changes
// no bit.
//
// Bytes: every partial result once, 4 head_dim a row and split, and its lse twice. Operations: 2 head_dim and an
// exponential a row and split. Bound by memory, by its latency where there are few: weights are known 32 splits
// ahead, so that many results are on their way at once (2M keys are 4,096 splits).
#include <cmath>

#include "kernels.h"
#include "sequence.cuh"
#include "softmax.cuh"

namespace longrope {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kMaxHeadDim = 256, kLaneDims = kMaxHeadDim / 32;
constexpr int kAtOnce = 8;                // splits whose loads are on their way together
constexpr int kStride = kMaxHeadDim + 2;  // of a warp's sums in shared memory: its largest lse and total behind

struct CombineLaunch {
    AttentionParams params;
    AttentionScratch scratch;
};

template <class T>
LONGROPE_KERNEL(kThreads)
attention_combine_kernel(const CombineLaunch launch) {
    const AttentionParams& p = launch.params;
    const AttentionScratch& scratch = launch.scratch;
    const int head_dim = static_cast<int>(p.head_dim), lane = lane_index();
    const int64_t row = block_index() % scratch.rows, head = block_index() / scratch.rows % p.key_heads;
    const Sequence s(p, block_index() / scratch.rows / p.key_heads);
    const RowMap map(p, head);
    if (row >= s.query_count * map.group || !decodes(p, s)) return;
    const int64_t first = (s.b * p.key_heads + head) * scratch.splits * scratch.rows + row;

    const auto lse_of = [&](int64_t split) {
        if (split >= scratch.splits) return -infinity();
        return load_global(static_cast<const float*>(scratch.partial_lse + first + split * scratch.rows));
    };
    const auto place_of = [](int warp, int column) {
        return static_cast<SharedAddress>((warp * kStride + column) * 4);
    };
    float most = -infinity();
    for (int64_t split = thread_index(); split < scratch.splits; split += kThreads) most = fmaxf(most, lse_of(split));
    most = warp_max(most);
    if (lane == 0) store_shared(place_of(warp_index(), kMaxHeadDim), most);
    block_sync();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, load_shared<float>(place_of(w, kMaxHeadDim)));
    const float shift = most == -infinity() ? 0.0f : most;

    const int64_t stride = kWarps * scratch.rows * head_dim;  // from a split of a warp to its next
    float total = 0.0f, out[kLaneDims] = {};
    for (int64_t begin = warp_index(); begin < scratch.splits; begin += 32 * kWarps) {
        const float weight = exp2_fast(lse_of(begin + lane * kWarps) - shift);
        total += weight;
        for (int i = 0; i < 32 && begin + i * kWarps < scratch.splits; i += kAtOnce) {
            float of_split[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) of_split[j] = shuffle(weight, i + j);
            const float* from = scratch.partial + (first + (begin + i * kWarps) * scratch.rows) * head_dim;
#pragma unroll
            for (int k = 0; k < kLaneDims; ++k) {
                const int d = lane + 32 * k;
                if (d >= head_dim) break;
                float x[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    // What is not seen was not written; a NaN is seen.
                    x[j] = of_split[j] != 0.0f ? load_global(from + j * stride + d) : 0.0f;
                }
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) out[k] += of_split[j] * x[j];
            }
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);

#pragma unroll
    for (int k = 0; k < kLaneDims; ++k) store_shared(place_of(warp_index(), lane + 32 * k), out[k]);
    if (lane == 0) store_shared(place_of(warp_index(), kMaxHeadDim + 1), total);
    block_sync();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += load_shared<float>(place_of(w, kMaxHeadDim + 1));
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    T* to = s.query_row<T>(p.out, map.head(row), map.token(row));
    for (int d = thread_index(); d < head_dim; d += kThreads) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) x += load_shared<float>(place_of(w, d));
        store_global(to + d, narrow<T>(x * inverse));
    }
    if (thread_index() == 0)
        store_global(s.lse(p, map.head(row), map.token(row)), sum != 0.0f ? (most + log2f(sum)) * kLn2 : -infinity());
}

template <class T>
void run(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    launch(attention_combine_kernel<T>, p.batch * p.key_heads * scratch.rows, kThreads,
           kWarps * kStride * static_cast<int>(sizeof(float)), CombineLaunch{p, scratch}, stream);
}

}  // namespace

void attention_combine(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run<Half>(params, scratch, stream);
    run<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
