// What the gradients of a row's scores have in common: delta = rowsum(dO * O) - dlse, before either backward kernel.
//
// A warp takes one row. Bytes: grad_out and out are read once, 4 head_dim a row, and 4 of dlse in and of delta out.
// Operations: 2 head_dim a row, and 5 shuffles. Bound by memory.
#include "kernels.h"
#include "rows.cuh"
#include "sequence.cuh"
#include "tile.cuh"

namespace longrope {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct DeltaLaunch {
    AttentionBackwardParams params;
    float* delta;
};

template <class T>
LONGROPE_KERNEL(kThreads)
attention_delta_kernel(const DeltaLaunch launch) {
    const AttentionParams& p = launch.params.forward;
    const int64_t index = block_index() * kWarps + warp_index();
    const int64_t i = index % p.query_tokens, head = index / p.query_tokens % p.query_heads;
    const int64_t b = index / p.query_tokens / p.query_heads;
    if (b >= p.batch) return;
    const Sequence s(p, b);
    if (i >= s.query_count) return;
    float sum = 0.0f;
    if (lane_index() * kChunk < p.head_dim) {
        const Float8 x = GlobalRow<T>{s.query_row<T>(launch.params.grad_out, head, i)}.load8(lane_index());
        const Float8 y = GlobalRow<T>{s.query_row<T>(p.out, head, i)}.load8(lane_index());
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += x.at[k] * y.at[k];
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    const int64_t at = s.lse(p, head, i) - p.lse;
    if (lane_index() == 0) store_global(launch.delta + at, sum - load_global(launch.params.grad_lse + at));
}

template <class T>
void run(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    const AttentionParams& p = params.forward;
    const int64_t rows = p.batch * p.query_heads * p.query_tokens;
    launch(attention_delta_kernel<T>, (rows + kWarps - 1) / kWarps, kThreads, 0, DeltaLaunch{params, scratch.delta},
           stream);
}

}  // namespace

void attention_delta(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    if (params.forward.dtype == Dtype::kFloat16) return run<Half>(params, scratch, stream);
    run<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
