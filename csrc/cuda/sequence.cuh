// Where the tokens of one sequence of a batch lie, and at which positions they are rotated.
#pragma once

#include "../core/params.h"
#include "../core/visible.h"
#include "primitives.cuh"

namespace longrope {

LONGROPE_DEVICE int64_t load_or(const int64_t* values, int64_t b, int64_t otherwise) {
    return values == nullptr ? otherwise : load_global(values + b);
}

template <class T>
LONGROPE_DEVICE T* row_of(const Operand& x, int64_t outer, int64_t head, int64_t token) {
    return static_cast<T*>(x.data) + outer * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

struct Sequence {
    int64_t b;
    int64_t query_start;  // index of the first query
    int64_t query_slot;   // row of the first query in its operand
    int64_t query_count;
    int64_t key_start;  // slot of the first key
    int64_t key_length;

    LONGROPE_DEVICE Sequence(const AttentionParams& p, int64_t batch_index)
        : b(batch_index),
          query_start(load_global(p.query_start + b)),
          query_slot(load_or(p.query_slot, b, 0)),
          query_count(load_or(p.query_count, b, p.query_tokens)),
          key_start(load_global(p.key_start + b)),
          key_length(load_global(p.key_length + b)) {}

    LONGROPE_DEVICE int64_t query_position(const AttentionParams& p, int64_t i) const {
        return p.query_positions == nullptr
                   ? query_start + i
                   : load_global(p.query_positions + b * p.query_positions_batch_stride + query_slot + i);
    }
    LONGROPE_DEVICE int64_t key_position(const AttentionParams& p, int64_t index) const {
        return p.key_positions == nullptr
                   ? index
                   : load_global(p.key_positions + b * p.key_positions_batch_stride + key_start + index);
    }
    LONGROPE_DEVICE Interval visible(const AttentionParams& p, int64_t i) const {
        return visible_interval(query_start + i, key_length, p.window_left, p.window_right);
    }
    // Queries that see key `index`.
    LONGROPE_DEVICE Interval seeing(const AttentionParams& p, int64_t index) const {
        return seeing_interval(index, query_start, query_count, p.window_left, p.window_right);
    }
    template <class T>
    LONGROPE_DEVICE T* query_row(const Operand& x, int64_t head, int64_t i) const {
        return row_of<T>(x, b, head, query_slot + i);
    }
    LONGROPE_DEVICE float* lse(const AttentionParams& p, int64_t head, int64_t i) const {
        return p.lse + b * p.lse_batch_stride + head * p.lse_head_stride + query_slot + i;
    }
};

// Where key `index` lies: in the sequence's slots, or in a page of its cache.
struct Slot {
    int64_t outer, token;
};

LONGROPE_DEVICE Slot slot_of(const Pages& pages, int64_t b, int64_t index) {
    const uint32_t key = static_cast<uint32_t>(index), size = static_cast<uint32_t>(pages.page_tokens);
    return {load_global(pages.block_table + b * pages.pages_per_sequence + key / size), key % size};
}

LONGROPE_DEVICE Slot slot_of(const AttentionParams& p, const Sequence& s, int64_t index) {
    if (p.pages.block_table == nullptr) return {s.b, s.key_start + index};
    return slot_of(p.pages, s.b, index);
}

LONGROPE_DEVICE bool quantised(const AttentionParams& p) {
    return p.pages.key_scale != nullptr;
}

// Calls `function` with an int8_t or an Fp8, whichever the pages of a quantised cache hold: its type is what counts.
template <class F>
LONGROPE_DEVICE auto with_format(const Pages& pages, const F& function) {
    return pages.stored == Stored::kFp8 ? function(Fp8{}) : function(int8_t{});
}

// Keys of a sequence that are quantised; those of the last group that is not whole wait in the tail.
LONGROPE_DEVICE int64_t quantised_keys(const Sequence& s) {
    return s.key_length / kKeyGroup * kKeyGroup;
}

// Scales of the channels of the group that holds a slot, float[head_dim]; P has pages, key_heads and head_dim.
template <class P>
LONGROPE_DEVICE const float* key_scale(const P& p, const Slot& slot, int64_t head) {
    const int64_t groups = p.pages.page_tokens / kKeyGroup;
    return p.pages.key_scale + ((slot.outer * p.key_heads + head) * groups + slot.token / kKeyGroup) * p.head_dim;
}

template <class P>
LONGROPE_DEVICE const float* value_scale(const P& p, const Slot& slot, int64_t head) {
    return p.pages.value_scale + (slot.outer * p.key_heads + head) * p.pages.page_tokens + slot.token;
}

// Rows of a sequence and a key head up to which its keys are split; more go to the blockwise kernel. Depends on the
// sequence alone; docs/cuda.md has the reckoning.
constexpr int kDecodeRows = 64;

LONGROPE_DEVICE bool decodes(const AttentionParams& p, const Sequence& s) {
    return s.query_count * (p.query_heads / p.key_heads) <= kDecodeRows;
}

// A row of a kernel's tile runs over tokens and, within a token, the query heads that share a key head.
struct RowMap {
    int64_t first_head;  // query head of row 0
    int group;           // query heads that share the key head

    LONGROPE_DEVICE RowMap(const AttentionParams& p, int64_t key_head)
        : first_head(key_head * (p.query_heads / p.key_heads)), group(static_cast<int>(p.query_heads / p.key_heads)) {}
    LONGROPE_DEVICE int64_t token(int64_t row) const { return row / group; }
    LONGROPE_DEVICE int64_t head(int64_t row) const { return first_head + row % group; }
};

}  // namespace longrope
