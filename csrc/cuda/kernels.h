// The CUDA kernels as plain functions: each enqueues its launches on a stream and returns.
//
// Pointers are device memory, 16-byte aligned with strides that are multiples of 8 elements where operands have 16
// bits.
#pragma once

#include "../core/params.h"
#include "primitives.cuh"

namespace longrope {

// Bytes of shared memory that a block may have on every GPU from sm_80 on; the least is that of sm_86 and sm_89.
constexpr int kSharedLimit = 99 << 10;

// Memory that a call needs besides its operands.
struct AttentionScratch {
    Operand key,
        value;  // as the attention kernel reads them: rotated keys, and values where a cache had to be gathered
    int64_t key_tokens;  // of the longest sequence
    // Partial results of split keys, null where keys are not split: fp32 [batch, key_heads, splits, rows, head_dim] of
    // normalised outputs, and [batch, key_heads, splits, rows] of lse in units of log 2.
    float *partial, *partial_lse;
    int64_t splits, rows;
};

void apply_rope(const RopeParams& params, Stream stream);

// Rotates every key of every sequence into `scratch.key`, and gathers the values of a cache into `scratch.value`.
void prepare_keys(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);

// Attention over keys that are rotated already, for the sequences of `params` with more rows than the decoder takes.
void attention_forward_sm80(const AttentionParams& params, Stream stream);

// Attention over unrotated keys, contiguous or in a cache, for the sequences with few rows: partial results by runs of
// keys, and their sum. Keys are split at multiples of `kSplitKeys`, by their index in the sequence.
constexpr int kSplitKeys = 512;
void attention_decode_sm80(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);
void attention_combine(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);

// Registers of a warp, lane after lane, in and out of one instruction (probes.cu).
struct ProbeParams {
    const void *a, *b, *c;
    void* out;
    Dtype dtype;
    int32_t transposed;
};
void probe_load_matrices(const ProbeParams& params, Stream stream);
void probe_multiply_add(const ProbeParams& params, Stream stream);

}  // namespace longrope
