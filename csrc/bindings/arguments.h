// From the tuples that Python hands over to the parameter structs: addresses, strides and sizes, nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../core/params.h"

namespace longrope {
namespace py = pybind11;

// (address, batch stride, head stride, token stride), strides in elements.
inline Operand operand(const py::tuple& t) {
    return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            t[3].cast<int64_t>()};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (turns, base_turns, start_tokens, attention_factor, regime_index) addresses, pairs, interleaved.
inline Rotation rotation(const py::tuple& t) {
    return {pointer<const int64_t>(t[0].cast<uintptr_t>()),
            pointer<const int64_t>(t[1].cast<uintptr_t>()),
            pointer<const int64_t>(t[2].cast<uintptr_t>()),
            pointer<const float>(t[3].cast<uintptr_t>()),
            pointer<const int32_t>(t[4].cast<uintptr_t>()),
            t[5].cast<int32_t>(),
            t[6].cast<int32_t>()};
}

// (input, output, positions address, positions batch stride, heads, tokens)
inline RopeOperand rope_operand(const py::tuple& t) {
    return {operand(t[0].cast<py::tuple>()),
            operand(t[1].cast<py::tuple>()),
            pointer<const int64_t>(t[2].cast<uintptr_t>()),
            t[3].cast<int64_t>(),
            t[4].cast<int64_t>(),
            t[5].cast<int64_t>()};
}

// Operands, tables and flags of a rotation.
inline RopeParams rope_params(const py::tuple& query, const py::tuple& key, const py::tuple& tables, int64_t batch,
                              int64_t head_dim, int dtype, bool conjugate, int threads) {
    return {{rope_operand(query), rope_operand(key)},
            rotation(tables),
            batch,
            head_dim,
            static_cast<Dtype>(dtype),
            conjugate,
            threads};
}

// (block_table address, pages per sequence, page_tokens, key_scale address, value_scale address, key_tail, Stored), or
// empty.
inline Pages pages(const py::tuple& t) {
    if (t.empty()) return {};
    return {pointer<const int32_t>(t[0].cast<uintptr_t>()),
            t[1].cast<int64_t>(),
            t[2].cast<int64_t>(),
            pointer<const float>(t[3].cast<uintptr_t>()),
            pointer<const float>(t[4].cast<uintptr_t>()),
            operand(t[5].cast<py::tuple>()),
            static_cast<Stored>(t[6].cast<int>())};
}

// (query, key, value, out, (lse, batch stride, head stride), tables, pages, (query_positions, batch stride),
//  (key_positions, batch stride), query_start, query_slot, query_count, key_start, key_length,
//  (batch, query_heads, key_heads, query_tokens, head_dim), window_left, window_right, scale, softcap, dtype, threads):
// operands, tables and pages as tuples, the rest addresses and numbers.
inline AttentionParams attention_params(const py::tuple& t) {
    AttentionParams p{};
    p.query = operand(t[0].cast<py::tuple>());
    p.key = operand(t[1].cast<py::tuple>());
    p.value = operand(t[2].cast<py::tuple>());
    p.out = operand(t[3].cast<py::tuple>());
    const auto lse = t[4].cast<py::tuple>();
    p.lse = pointer<float>(lse[0].cast<uintptr_t>());
    p.lse_batch_stride = lse[1].cast<int64_t>();
    p.lse_head_stride = lse[2].cast<int64_t>();
    p.rotation = rotation(t[5].cast<py::tuple>());
    p.pages = pages(t[6].cast<py::tuple>());
    const auto query_positions = t[7].cast<py::tuple>(), key_positions = t[8].cast<py::tuple>();
    p.query_positions = pointer<const int64_t>(query_positions[0].cast<uintptr_t>());
    p.query_positions_batch_stride = query_positions[1].cast<int64_t>();
    p.key_positions = pointer<const int64_t>(key_positions[0].cast<uintptr_t>());
    p.key_positions_batch_stride = key_positions[1].cast<int64_t>();
    p.query_start = pointer<const int64_t>(t[9].cast<uintptr_t>());
    p.query_slot = pointer<const int64_t>(t[10].cast<uintptr_t>());
    p.query_count = pointer<const int64_t>(t[11].cast<uintptr_t>());
    p.key_start = pointer<const int64_t>(t[12].cast<uintptr_t>());
    p.key_length = pointer<const int64_t>(t[13].cast<uintptr_t>());
    const auto sizes = t[14].cast<py::tuple>();
    p.batch = sizes[0].cast<int64_t>();
    p.query_heads = sizes[1].cast<int64_t>();
    p.key_heads = sizes[2].cast<int64_t>();
    p.query_tokens = sizes[3].cast<int64_t>();
    p.head_dim = sizes[4].cast<int64_t>();
    p.window_left = t[15].cast<int64_t>();
    p.window_right = t[16].cast<int64_t>();
    p.scale = t[17].cast<float>();
    p.softcap = t[18].cast<float>();
    p.dtype = static_cast<Dtype>(t[19].cast<int>());
    p.threads = t[20].cast<int32_t>();
    return p;
}

// (key, value, key_pages, value_pages, pages, length, count, (batch, key_heads, head_dim), dtype, threads).
inline AppendParams append_params(const py::tuple& t) {
    const auto sizes = t[7].cast<py::tuple>();
    return {operand(t[0].cast<py::tuple>()),
            operand(t[1].cast<py::tuple>()),
            operand(t[2].cast<py::tuple>()),
            operand(t[3].cast<py::tuple>()),
            pages(t[4].cast<py::tuple>()),
            pointer<const int64_t>(t[5].cast<uintptr_t>()),
            pointer<const int64_t>(t[6].cast<uintptr_t>()),
            sizes[0].cast<int64_t>(),
            sizes[1].cast<int64_t>(),
            sizes[2].cast<int64_t>(),
            static_cast<Dtype>(t[8].cast<int>()),
            t[9].cast<int32_t>()};
}

}  // namespace longrope
