// What the backward kernels for Hopper share besides gradients.cuh: their arguments and their launch.
#pragma once

#include "../kernels.h"
#include "gradients.cuh"

namespace longrope {

struct GradientLaunch {
    TensorMap queries, grads, keys, values;  // rotated queries, grad_out, rotated keys, values
    AttentionBackwardParams params;
    BackwardScratch scratch;
    Schedule schedule;
    ScoreScale scale;
};

LONGROPE_DEVICE int clamped(int64_t x, int most) {
    return static_cast<int>(x < 0 ? 0 : x < most ? x : most);
}

// Launches a kernel over tensor maps of queries and grad_out in boxes of `rows` rows, keys and values in boxes of
// `keys`.
template <class Kernel>
void launch_gradients(Kernel kernel, const AttentionBackwardParams& params, const BackwardScratch& scratch,
                      const Schedule& schedule, int shared_bytes, int rows, int keys, int64_t query_tokens,
                      int64_t key_tokens, Stream stream) {
    if (schedule.tiles() == 0) return;
    const AttentionParams& p = params.forward;
    const auto query_map = [&](const Operand& x) { return operand_map(x, p, p.query_heads, query_tokens, rows); };
    const auto key_map = [&](const Operand& x) { return operand_map(x, p, p.key_heads, key_tokens, keys); };
    const GradientLaunch arguments{query_map(scratch.query),
                                   query_map(params.grad_out),
                                   key_map(scratch.key),
                                   key_map(p.value),
                                   params,
                                   scratch,
                                   schedule,
                                   ScoreScale(p.scale, p.softcap)};
    launch(kernel, blocks_of(schedule), kThreads, shared_bytes, arguments, stream);
}

// Gradients at head_dim above 128 (attention_backward_wide.cu), after attention_delta.
void attention_backward_wide_sm90(const AttentionBackwardParams& params, const BackwardScratch& scratch,
                                  int64_t query_tokens, int64_t key_tokens, Stream stream);

}  // namespace longrope
