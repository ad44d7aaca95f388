// Parameters of each op as one struct of pointers, strides and sizes: the same names on every backend.
#pragma once

#include <cstdint>

namespace longrope {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A [batch, heads, tokens, head_dim] operand; the last dimension has unit stride.
struct Operand {
    void* data;
    int64_t batch_stride;  // in elements
    int64_t head_stride;   // in elements
    int64_t token_stride;  // in elements
};

// Tables of R regimes over `pairs` pairs, row major.
struct Rotation {
    const int64_t* turns;           // [R, pairs], 2^-64 turn per token, from start_tokens on
    const int64_t* base_turns;      // [R, pairs], 2^-64 turn per token, below start_tokens
    const int64_t* start_tokens;    // [R], tokens
    const float* attention_factor;  // [R], multiplies cos and sin
    const int32_t* regime_index;    // [batch], row of the tables
    int32_t pairs;                  // rotary_dim / 2
    int32_t interleaved;            // pairs are dims (2i, 2i+1) rather than (i, i + pairs)
};

struct RopeOperand {
    Operand input;
    Operand output;
    const int64_t* positions;        // [batch, tokens], unit stride in tokens
    int64_t positions_batch_stride;  // in elements; 0: shared by the batch
    int64_t heads, tokens;
};

struct RopeParams {
    RopeOperand operands[2];  // query and key; heads 0: absent
    Rotation rotation;
    int64_t batch, head_dim;
    Dtype dtype;
    int32_t conjugate;  // rotate back
    int32_t threads;
};

// Keys that share one scale per channel in a quantised cache, by index in the sequence.
constexpr int kKeyGroup = 64;

// What the pages of a cache hold: the dtype of the query, int8, or fp8 (core/fp8.h).
enum class Stored : int32_t { kAsGiven = 0, kInt8 = 1, kFp8 = 2 };

// A cache in pages: key `index` of sequence b lies in page block_table[b][index / page_tokens], and the page takes the
// batch's place in the strides of key and value.
struct Pages {
    const int32_t* block_table;  // [batch, pages_per_sequence] contiguous; null: no pages
    int64_t pages_per_sequence, page_tokens;
    // A quantised cache; null: keys and values are in the dtype of the query. Whole groups of keys are quantised, those
    // of the last one wait in key_tail until it is whole.
    const float* key_scale;    // [pages, key_heads, page_tokens / kKeyGroup, head_dim] contiguous
    const float* value_scale;  // [pages, key_heads, page_tokens] contiguous
    Operand key_tail;          // [batch, key_heads, kKeyGroup, head_dim]
    Stored stored;
};

struct AttentionParams {
    Operand query;  // [batch, query_heads, query_tokens, head_dim]
    Operand key;    // [batch, key_heads, key_tokens, head_dim], or pages instead of the batch
    Operand value;  // like key
    Operand out;    // like query
    float* lse;     // [batch, query_heads, query_tokens], natural log
    int64_t lse_batch_stride, lse_head_stride;  // in elements
    Rotation rotation;
    Pages pages;
    // Positions of query row and key slot; null: the index. Batch strides in elements.
    const int64_t *query_positions, *key_positions;
    int64_t query_positions_batch_stride, key_positions_batch_stride;
    const int64_t* query_start;  // [batch], index of the first query
    const int64_t* query_slot;   // [batch], row of the first query; null: 0
    const int64_t* query_count;  // [batch], queries; null: query_tokens
    const int64_t* key_start;    // [batch], first key slot
    const int64_t* key_length;   // [batch], keys
    int64_t batch, query_heads, key_heads, head_dim;
    int64_t query_tokens;  // of the longest sequence
    int64_t window_left;   // keys before the query, -1: unbounded
    int64_t window_right;  // keys after the query, -1: unbounded; causal is 0
    float scale;           // of the scores
    float softcap;         // 0: none
    Dtype dtype;
    int32_t threads;
};

// What appending to a cache writes: `count[b]` tokens from row 0 of key and value to indices from `length[b]` on.
struct AppendParams {
    Operand key, value;              // [batch, key_heads, tokens, head_dim], read
    Operand key_pages, value_pages;  // [pages, key_heads, page_tokens, head_dim], written
    Pages pages;                     // scales and tail are written too
    const int64_t *length, *count;   // [batch]
    int64_t batch, key_heads, head_dim;
    Dtype dtype;
    int32_t threads;
};

struct AttentionBackwardParams {
    AttentionParams forward;  // out and lse as the forward pass left them
    Operand grad_out;         // like out
    const float* grad_lse;    // like lse, of its strides
    Operand grad_query;       // like query
    Operand grad_key;         // like key
    Operand grad_value;       // like value
    double* grad_inv_freq;    // [batch, pairs], contiguous; null: not wanted
};

}  // namespace longrope
