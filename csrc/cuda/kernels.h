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

// Blocks of so much shared memory that a multiprocessor has room for; the system takes a part of each for itself.
constexpr int blocks_that_fit(int multiprocessor_shared, int shared_bytes) {
    return multiprocessor_shared / (shared_bytes + (1 << 10));
}

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
// The same on Hopper; `key_tokens` is how many tokens a sequence's, or a packed batch's, keys and values have room for.
void attention_forward_sm90(const AttentionParams& params, int64_t key_tokens, Stream stream);

// Attention over unrotated keys, contiguous or in a cache, for the sequences with few rows: partial results by runs of
// keys, and their sum. Keys are split at multiples of `kSplitKeys`, by their index in the sequence.
constexpr int kSplitKeys = 512;
void attention_decode_sm80(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);
void attention_combine(const AttentionParams& params, const AttentionScratch& scratch, Stream stream);

// Memory of the backward pass.
struct BackwardScratch {
    Operand query, key;  // rotated
    float* delta;        // of the strides of lse: rowsum(grad_out * out) - grad_lse
    // Parts of the gradient of the frequencies, double [batch, key_heads, row_blocks or key_blocks, pairs], zeros to
    // begin with; null: not wanted.
    double *query_part, *key_part;
    // Of a key head and the longest sequence: keys by kBackwardKeys, rows by kBackwardRows. On sm_80 rows run over
    // tokens and, within a token, query heads; on sm_90 over the tokens of one query head after another, and no block
    // has rows of two.
    int64_t row_blocks, key_blocks;
};

// Rotates every query into `rotated`.
void prepare_queries(const AttentionParams& params, const Operand& rotated, Stream stream);

// Fills `scratch.delta`; a part of both kernels below.
void attention_delta(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream);

// Gradients of attention; `grad_inv_freq` of `params` is not written, its parts are.
constexpr int kBackwardRows = 64, kBackwardKeys = 64;
void attention_backward_sm80(const AttentionBackwardParams& params, const BackwardScratch& scratch, Stream stream);
// The same on Hopper; `query_tokens` and `key_tokens` are how many tokens a sequence's, or a packed
// batch's, queries and keys have room for.
void attention_backward_sm90(const AttentionBackwardParams& params, const BackwardScratch& scratch,
                             int64_t query_tokens, int64_t key_tokens, Stream stream);

// Appends up to `tokens` rows of key and value to a cache.
void cache_append(const AppendParams& params, int64_t tokens, Stream stream);

// Registers of a warp, lane after lane, in and out of one instruction (probes.cu).
struct ProbeParams {
    const void *a, *b, *c;
    void* out;
    Dtype dtype;
    int32_t transposed;
};
void probe_load_matrices(const ProbeParams& params, Stream stream);
void probe_multiply_add(const ProbeParams& params, Stream stream);

// One product of a warpgroup (sm90/probes.cu): operands from an image of shared memory by descriptors, or A from
// registers [128, 8] of T; accumulators [128, columns / 2] in and out.
struct GroupProbe {
    struct Matrix {
        uint32_t start, leading_bytes, stride_bytes;
        int32_t swizzle, transposed;
    };
    const void *image, *registers;
    float* d;
    Matrix left, right;
    int32_t columns, accumulate;
    Dtype dtype;
};
void probe_group_multiply(const GroupProbe& params, Stream stream);
// The shared memory that a copy of the box at `at` fills.
void probe_copy_tensor(const TensorShape& shape, const int32_t* at, void* out, Stream stream);

}  // namespace longrope
