// What the gradients of a row's scores have in common: delta = rowsum(dO * O) - dlse, before either backward kernel.
//
// A block takes rows of one head of one sequence, a thread one chunk of kSteps rows, all of which are on their way
// before the first is multiplied. Bytes: grad_out and out are read once, 4 head_dim a row, and 4 of dlse in and of
// delta out. Operations: 2 head_dim a row. Bound by memory: a row of 128 dims costs 40 instructions of a warp, since
// places are found once for kSteps rows, which are 10 cycles of a multiprocessor beside 24 (H200) or 38 (A100) for its
// bytes.
#include "kernels.h"
#include "rows.cuh"
#include "sequence.cuh"
#include "tile.cuh"

namespace longrope {
namespace {

constexpr int kThreads = 128, kSteps = 4;

struct DeltaLaunch {
    AttentionBackwardParams params;
    float* delta;
    uint32_t row_blocks;  // of a head
};

// Of a block where kLanes lanes share a row.
template <int kLanes>
struct Rows {
    static constexpr int kAtOnce = kThreads / kLanes, kAll = kSteps * kAtOnce;
};

template <class T, int kLanes>
LONGROPE_KERNEL(kThreads)
attention_delta_kernel(const DeltaLaunch launch) {
    using R = Rows<kLanes>;
    const AttentionParams& p = launch.params.forward;
    const uint32_t block = static_cast<uint32_t>(block_index()), heads = static_cast<uint32_t>(p.query_heads);
    const int64_t head = block / launch.row_blocks % heads, begin = int64_t{block % launch.row_blocks} * R::kAll;
    const Sequence s(p, block / launch.row_blocks / heads);
    if (begin >= s.query_count) return;
    const int64_t first = begin + thread_index() / kLanes, left = s.query_count - first;
    const int chunk = thread_index() % kLanes;
    const Operand& grads = launch.params.grad_out;
    T* grad = s.query_row<T>(grads, head, first);
    T* out = s.query_row<T>(p.out, head, first);
    Vec16 x[kSteps] = {}, y[kSteps] = {};
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        if (j * R::kAtOnce >= left || chunk * kChunk >= p.head_dim) continue;
        x[j] = GlobalRow<T>{grad + j * R::kAtOnce * grads.token_stride}.load16(chunk);
        y[j] = GlobalRow<T>{out + j * R::kAtOnce * p.out.token_stride}.load16(chunk);
    }
    float sum = 0.0f;  // of the row that the lane stores, that of step `chunk`
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
        const Float8 a = unpack8<T>(x[j]), b = unpack8<T>(y[j]);
        float of_row = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) of_row += a.at[k] * b.at[k];
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) of_row += shuffle_xor(of_row, mask);
        if (chunk == j) sum = of_row;
    }
    if (chunk >= kSteps || chunk * R::kAtOnce >= left) return;
    const int64_t at = s.lse(p, head, first + chunk * R::kAtOnce) - p.lse;
    store_global(launch.delta + at, sum - load_global(launch.params.grad_lse + at));
}

template <class T, int kLanes>
void run(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    const AttentionParams& p = params.forward;
    const int64_t row_blocks = (p.query_tokens + Rows<kLanes>::kAll - 1) / Rows<kLanes>::kAll;
    launch(attention_delta_kernel<T, kLanes>, p.batch * p.query_heads * row_blocks, kThreads, 0,
           DeltaLaunch{params, scratch.delta, static_cast<uint32_t>(row_blocks)}, stream);
}

template <class T>
void run_of_width(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    const int64_t chunks = params.forward.head_dim / kChunk;
    if (chunks <= 8) return run<T, 8>(params, scratch, stream);
    if (chunks <= 16) return run<T, 16>(params, scratch, stream);
    run<T, 32>(params, scratch, stream);
}

}  // namespace

void attention_delta(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream) {
    if (params.forward.dtype == Dtype::kFloat16) return run_of_width<Half>(params, scratch, stream);
    run_of_width<BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope
