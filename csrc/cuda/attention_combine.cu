// The sum of the partial results of split keys.
//
// A block takes one row. Its four warps walk every fourth split each, with a running maximum, and their sums are added
// in the order of the warps. Which warp takes a split, and in which order, depends on the split's number alone, and
// splits that a row does not see are skipped: what a sequence shares its batch with changes no bit.
//
// Bytes: every partial result once. Bound by memory.
#include <cmath>

#include "kernels.h"
#include "sequence.cuh"
#include "softmax.cuh"

namespace longrope {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMaxHeadDim = 256, kLaneDims = kMaxHeadDim / 32;

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

    float top = -infinity(), total = 0.0f, out[kLaneDims] = {};
    for (int64_t split = warp_index(); split < scratch.splits; split += kWarps) {
        const int64_t place = first + split * scratch.rows;
        const float lse = load_global(static_cast<const float*>(scratch.partial_lse + place));
        if (lse == -infinity()) continue;
        const float now = fmaxf(top, lse), keep = exp2_fast(top - now), weight = exp2_fast(lse - now);
        top = now;
        total = total * keep + weight;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            const int d = lane + 32 * i;
            if (d < head_dim)
                out[i] = out[i] * keep +
                         weight * load_global(static_cast<const float*>(scratch.partial + place * head_dim + d));
        }
    }

    constexpr int kStride = kMaxHeadDim + 2;
    const auto place_of = [](int warp, int column) {
        return static_cast<SharedAddress>((warp * kStride + column) * 4);
    };
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) store_shared(place_of(warp_index(), lane + 32 * i), out[i]);
    if (lane == 0) {
        store_shared(place_of(warp_index(), kMaxHeadDim), top);
        store_shared(place_of(warp_index(), kMaxHeadDim + 1), total);
    }
    block_sync();
    float most = -infinity(), sum = 0.0f, keep[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, load_shared<float>(place_of(w, kMaxHeadDim)));
    const float shift = most == -infinity() ? 0.0f : most;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        keep[w] = exp2_fast(load_shared<float>(place_of(w, kMaxHeadDim)) - shift);
        sum += keep[w] * load_shared<float>(place_of(w, kMaxHeadDim + 1));
    }
    const float inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
    T* to = s.query_row<T>(p.out, map.head(row), map.token(row));
    for (int d = thread_index(); d < head_dim; d += kThreads) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) x += keep[w] * load_shared<float>(place_of(w, d));
        store_global(to + d, narrow<T>(x * inverse));
    }
    if (thread_index() == 0)
        store_global(s.lse(p, map.head(row), map.token(row)), sum != 0.0f ? (most + log2f(sum)) * kLn2 : -infinity());
}

template <class T>
void run(const AttentionParams& p, const AttentionScratch& scratch, Stream stream) {
    launch(attention_combine_kernel<T>, p.batch * p.key_heads * scratch.rows, kThreads,
           kWarps * (kMaxHeadDim + 2) * static_cast<int>(sizeof(float)), CombineLaunch{p, scratch}, stream);
}

}  // namespace

void attention_combine(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run<Half>(params, scratch, stream);
    run<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
