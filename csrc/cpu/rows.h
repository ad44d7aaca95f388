// Where the rows of a sequence lie: queries in a batch or packed, keys and values in an operand or in a cache's pages,
// in the dtype of the query or as int8. Internal linkage, as in vec.h.
#pragma once

#include <algorithm>

#include "../core/visible.h"
#include "vec.h"

namespace longrope {
namespace {

template <class T>
const T* row_of(const Operand& x, int64_t b, int64_t head, int64_t token) {
    return static_cast<const T*>(x.data) + b * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

inline int64_t query_count(const AttentionParams& p, int64_t b) {
    return p.query_count ? p.query_count[b] : p.query_tokens;
}

// Row of the operand that holds query i of sequence b.
inline int64_t query_row(const AttentionParams& p, int64_t b, int64_t i) {
    return p.query_slot ? p.query_slot[b] + i : i;
}

inline int64_t query_position(const AttentionParams& p, int64_t b, int64_t i) {
    return p.query_positions ? p.query_positions[b * p.query_positions_batch_stride + query_row(p, b, i)]
                             : p.query_start[b] + i;
}

inline int64_t key_position(const AttentionParams& p, int64_t b, int64_t index) {
    return p.key_positions ? p.key_positions[b * p.key_positions_batch_stride + p.key_start[b] + index] : index;
}

// Of query `head`, i in the lse of sequence b.
inline int64_t lse_index(const AttentionParams& p, int64_t b, int64_t head, int64_t i) {
    return b * p.lse_batch_stride + head * p.lse_head_stride + query_row(p, b, i);
}

// The half-open interval of key indices that query i of sequence b sees.
inline void visible_keys(const AttentionParams& p, int64_t b, int64_t i, int64_t* low, int64_t* high) {
    const Interval seen = visible_interval(p.query_start[b] + i, p.key_length[b], p.window_left, p.window_right);
    *low = seen.low;
    *high = seen.high;
}

// Outer index (sequence or page) and token of key `index`.
struct Slot {
    int64_t outer, token;
};

inline Slot slot_of(const Pages& pages, int64_t b, int64_t index) {
    return {pages.block_table[b * pages.pages_per_sequence + index / pages.page_tokens], index % pages.page_tokens};
}

inline Slot slot_of(const AttentionParams& p, int64_t b, int64_t index) {
    return p.pages.block_table ? slot_of(p.pages, b, index) : Slot{b, p.key_start[b] + index};
}

// Calls call(k, run, slot) for each run of keys first + k, ... that lie in a row, k + run <= count: one division a
// page.
template <class Call>
inline void for_slots(const AttentionParams& p, int64_t b, int64_t first, int count, const Call& call) {
    for (int k = 0, run; k < count; k += run) {
        const Slot slot = slot_of(p, b, first + k);
        run = count - k;
        if (p.pages.block_table) run = static_cast<int>(std::min<int64_t>(run, p.pages.page_tokens - slot.token));
        call(k, run, slot);
    }
}

// What 1 of a score in log2 is as a natural one, given how the factor between them is rounded.
inline double natural_units(const AttentionParams& p) {
    const float natural = p.softcap > 0.0f ? p.softcap : p.scale, binary = natural * kLog2E;
    return binary == 0.0f ? 1.0 : static_cast<double>(natural) / binary;
}

// Where the scales of a slot lie: those of the channels of its group of keys, and that of its value.
inline int64_t key_scale_index(const Pages& pages, const Slot& slot, int64_t key_heads, int64_t head,
                               int64_t head_dim) {
    const int64_t groups = pages.page_tokens / kKeyGroup;
    return ((slot.outer * key_heads + head) * groups + slot.token / kKeyGroup) * head_dim;
}

inline int64_t value_scale_index(const Pages& pages, const Slot& slot, int64_t key_heads, int64_t head) {
    return (slot.outer * key_heads + head) * pages.page_tokens + slot.token;
}

inline bool quantised(const AttentionParams& p) {
    return p.pages.key_scale != nullptr;
}

// Keys of sequence b that are quantised; the rest are in the tail.
inline int64_t quantised_keys(const AttentionParams& p, int64_t b) {
    return p.key_length[b] / kKeyGroup * kKeyGroup;
}

// Scales of the channels of the group that holds a slot, float[head_dim].
inline const float* key_scale(const AttentionParams& p, const Slot& slot, int64_t head) {
    return p.pages.key_scale + key_scale_index(p.pages, slot, p.key_heads, head, p.head_dim);
}

// Scales of the value in a slot and of those after it in the page.
inline const float* value_scales(const AttentionParams& p, const Slot& slot, int64_t head) {
    return p.pages.value_scale + value_scale_index(p.pages, slot, p.key_heads, head);
}

// Rotates key `index` and rounds it to T. `wide`: float[head_dim], for quantised keys.
template <class T>
void rotated_key(const AttentionParams& p, int64_t b, int64_t head, int64_t index, const float* cosines,
                 const float* sines, float* wide, T* to) {
    const int pairs = p.rotation.pairs;
    const bool interleaved = p.rotation.interleaved;
    if (quantised(p) && index >= quantised_keys(p, b)) {
        const T* row = row_of<T>(p.pages.key_tail, b, head, index % kKeyGroup);
        return rotate_row(row, p.head_dim, pairs, interleaved, cosines, sines, to);
    }
    const Slot slot = slot_of(p, b, index);
    if (!quantised(p))
        return rotate_row(row_of<T>(p.key, slot.outer, head, slot.token), p.head_dim, pairs, interleaved, cosines,
                          sines, to);
    const int8_t* row = row_of<int8_t>(p.key, slot.outer, head, slot.token);
    const float* scale = key_scale(p, slot, head);
    for (int64_t d = 0; d < p.head_dim; ++d) wide[d] = row[d] * scale[d];
    rotate_row(wide, p.head_dim, pairs, interleaved, cosines, sines, to);
}

// Values [first, first + count) of a sequence as rows of T, `*stride` elements apart: in place, or gathered in
// `buffer`.
template <class T>
const T* value_rows(const AttentionParams& p, int64_t b, int64_t head, int64_t first, int count, T* buffer,
                    int64_t* stride) {
    if (p.pages.block_table == nullptr) {
        *stride = p.value.token_stride;
        return row_of<T>(p.value, b, head, p.key_start[b] + first);
    }
    *stride = p.head_dim;
    for (int k = 0; k < count; ++k) {
        const Slot slot = slot_of(p, b, first + k);
        T* to = buffer + k * p.head_dim;
        if (quantised(p)) {
            const int8_t* row = row_of<int8_t>(p.value, slot.outer, head, slot.token);
            const float scale = *value_scales(p, slot, head);
            for (int64_t d = 0; d < p.head_dim; ++d) narrow(row[d] * scale, to + d);
        } else {
            std::memcpy(static_cast<void*>(to), row_of<T>(p.value, slot.outer, head, slot.token),
                        sizeof(T) * p.head_dim);
        }
    }
    return buffer;
}

}  // namespace
}  // namespace longrope
