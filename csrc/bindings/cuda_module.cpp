// The Python face of the CUDA kernels, as the module LONGROPE_MODULE: built by nvcc, or by a host compiler over the
// emulator, which then has its own switches besides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "../cuda/kernels.h"
#include "../cuda/schedule.cuh"
#include "../cuda/sequence.cuh"
#include "arguments.h"

#if !defined(__CUDACC__)
#include "../cuda/sm80/decode_keys.cuh"
#include "../emulator/machine.h"
#endif

namespace longrope {
namespace {

Stream stream_of(uintptr_t address) {
    return reinterpret_cast<Stream>(address);
}

// (key, value, key_tokens, partial address, partial_lse address, splits, rows)
AttentionScratch scratch(const py::tuple& t) {
    return {operand(t[0].cast<py::tuple>()),
            operand(t[1].cast<py::tuple>()),
            t[2].cast<int64_t>(),
            pointer<float>(t[3].cast<uintptr_t>()),
            pointer<float>(t[4].cast<uintptr_t>()),
            t[5].cast<int64_t>(),
            t[6].cast<int64_t>()};
}

// Arguments, (grad_out, grad_lse address, grad_query, grad_key, grad_value).
AttentionBackwardParams backward_params(const py::tuple& arguments, const py::tuple& gradients) {
    return {attention_params(arguments),
            operand(gradients[0].cast<py::tuple>()),
            pointer<const float>(gradients[1].cast<uintptr_t>()),
            operand(gradients[2].cast<py::tuple>()),
            operand(gradients[3].cast<py::tuple>()),
            operand(gradients[4].cast<py::tuple>()),
            nullptr};
}

// (query, key, delta address, query_part address, key_part address, row_blocks, key_blocks)
BackwardScratch backward_scratch(const py::tuple& t) {
    return {operand(t[0].cast<py::tuple>()),
            operand(t[1].cast<py::tuple>()),
            pointer<float>(t[2].cast<uintptr_t>()),
            pointer<double>(t[3].cast<uintptr_t>()),
            pointer<double>(t[4].cast<uintptr_t>()),
            t[5].cast<int64_t>(),
            t[6].cast<int64_t>()};
}

// Addresses of a, b, c and out, dtype, transposed.
ProbeParams probe(const py::tuple& t) {
    return {pointer<void>(t[0].cast<uintptr_t>()),    pointer<void>(t[1].cast<uintptr_t>()),
            pointer<void>(t[2].cast<uintptr_t>()),    pointer<void>(t[3].cast<uintptr_t>()),
            static_cast<Dtype>(t[4].cast<int32_t>()), t[5].cast<int32_t>()};
}

// start, leading and stride bytes, swizzle, transposed.
GroupProbe::Matrix probe_matrix(const py::tuple& t) {
    return {t[0].cast<uint32_t>(), t[1].cast<uint32_t>(), t[2].cast<uint32_t>(), t[3].cast<int32_t>(),
            t[4].cast<int32_t>()};
}

// Addresses of image, registers and d, left, right, columns, accumulate, dtype.
GroupProbe group_probe(const py::tuple& t) {
    return {pointer<void>(t[0].cast<uintptr_t>()),
            pointer<void>(t[1].cast<uintptr_t>()),
            pointer<float>(t[2].cast<uintptr_t>()),
            probe_matrix(t[3].cast<py::tuple>()),
            probe_matrix(t[4].cast<py::tuple>()),
            t[5].cast<int32_t>(),
            t[6].cast<int32_t>(),
            static_cast<Dtype>(t[7].cast<int32_t>())};
}

// Address, sizes, box, strides in bytes, swizzle.
TensorShape tensor_shape(uintptr_t data, const std::vector<uint32_t>& size, const std::vector<uint32_t>& box,
                         const std::vector<uint64_t>& stride_bytes, int swizzle) {
    TensorShape shape{};
    if (size.empty() || size.size() > kMaxTensorRank || box.size() != size.size() ||
        stride_bytes.size() + 1 != size.size())
        throw std::invalid_argument("sizes, box and strides do not fit each other");
    shape.data = pointer<void>(data);
    shape.rank = static_cast<int32_t>(size.size());
    shape.swizzle = static_cast<Swizzle>(swizzle);
    std::copy(size.begin(), size.end(), shape.size);
    std::copy(box.begin(), box.end(), shape.box);
    std::copy(stride_bytes.begin(), stride_bytes.end(), shape.stride_bytes);
    return shape;
}

}  // namespace
}  // namespace longrope

using namespace longrope;

PYBIND11_MODULE(LONGROPE_MODULE, m) {
    m.doc() = "CUDA kernels of longrope_kernels; call them through longrope_kernels.backends.cuda";
    m.def("apply_rope", [](const py::tuple& query, const py::tuple& key, const py::tuple& tables, int64_t batch,
                           int64_t head_dim, int dtype, bool conjugate, uintptr_t stream) {
        apply_rope(rope_params(query, key, tables, batch, head_dim, dtype, conjugate, 0), stream_of(stream));
    });
    m.def("prepare_keys", [](const py::tuple& arguments, const py::tuple& extra, uintptr_t stream) {
        prepare_keys(attention_params(arguments), scratch(extra), stream_of(stream));
    });
    m.def("attention_forward_sm80", [](const py::tuple& arguments, uintptr_t stream) {
        attention_forward_sm80(attention_params(arguments), stream_of(stream));
    });
    m.def("attention_forward_sm90", [](const py::tuple& arguments, int64_t key_tokens, uintptr_t stream) {
        attention_forward_sm90(attention_params(arguments), key_tokens, stream_of(stream));
    });
    // Pair and row block of every tile, in the order in which a block takes them.
    m.def("schedule", [](int32_t pairs, int32_t row_blocks, int32_t section, int32_t block, int32_t blocks) {
        const Schedule schedule{pairs, row_blocks, section};
        std::vector<std::pair<int32_t, int32_t>> places;
        for (int32_t round = 0; round * blocks < schedule.tiles(); ++round) {
            const int32_t tile = Schedule::dealt(round, block, blocks);
            if (tile >= schedule.tiles()) continue;
            const Schedule::Place place = schedule.at(tile);
            places.emplace_back(place.pair, place.row_block);
        }
        return places;
    });
    m.def("attention_decode_sm80", [](const py::tuple& arguments, const py::tuple& extra, uintptr_t stream) {
        attention_decode_sm80(attention_params(arguments), scratch(extra), stream_of(stream));
    });
    m.def("attention_combine", [](const py::tuple& arguments, const py::tuple& extra, uintptr_t stream) {
        attention_combine(attention_params(arguments), scratch(extra), stream_of(stream));
    });
    m.def("cache_append", [](const py::tuple& arguments, int64_t tokens, uintptr_t stream) {
        cache_append(append_params(arguments), tokens, stream_of(stream));
    });
    m.def("prepare_queries", [](const py::tuple& arguments, const py::tuple& rotated, uintptr_t stream) {
        prepare_queries(attention_params(arguments), operand(rotated), stream_of(stream));
    });
    m.def("attention_backward_sm80", [](const py::tuple& arguments, const py::tuple& gradients, const py::tuple& extra,
                                        uintptr_t stream) {
        attention_backward_sm80(backward_params(arguments, gradients), backward_scratch(extra), stream_of(stream));
    });
    m.def("attention_backward_sm90", [](const py::tuple& arguments, const py::tuple& gradients, const py::tuple& extra,
                                        int64_t query_tokens, int64_t key_tokens, uintptr_t stream) {
        attention_backward_sm90(backward_params(arguments, gradients), backward_scratch(extra), query_tokens,
                                key_tokens, stream_of(stream));
    });
    m.attr("BACKWARD_ROWS") = kBackwardRows;
    m.attr("BACKWARD_KEYS") = kBackwardKeys;
    m.attr("DECODE_ROWS") = kDecodeRows;
    m.attr("SPLIT_KEYS") = kSplitKeys;
    m.attr("KEY_GROUP") = kKeyGroup;
    m.def("probe_load_matrices",
          [](const py::tuple& t, uintptr_t stream) { probe_load_matrices(probe(t), stream_of(stream)); });
    m.def("probe_multiply_add",
          [](const py::tuple& t, uintptr_t stream) { probe_multiply_add(probe(t), stream_of(stream)); });
    m.def("probe_group_multiply",
          [](const py::tuple& t, uintptr_t stream) { probe_group_multiply(group_probe(t), stream_of(stream)); });
    m.def("probe_copy_tensor", [](uintptr_t data, const std::vector<uint32_t>& size, const std::vector<uint32_t>& box,
                                  const std::vector<uint64_t>& stride_bytes, int swizzle,
                                  const std::vector<int32_t>& at, uintptr_t out, uintptr_t stream) {
        const TensorShape shape = tensor_shape(data, size, box, stride_bytes, swizzle);
        if (at.size() != size.size()) throw std::invalid_argument("coordinates do not fit the sizes");
        probe_copy_tensor(shape, at.data(), pointer<void>(out), stream_of(stream));
    });
#if !defined(__CUDACC__)
    using emulator::Machine;
    m.def(
        "declare",
        [](const std::vector<std::tuple<uintptr_t, int64_t, bool, std::string>>& ranges) {
            std::vector<emulator::Range> declared;
            for (const auto& [begin, bytes, writable, name] : ranges)
                declared.push_back({begin, begin + bytes, writable, name});
            Machine::get().global.declare(std::move(declared));
        },
        "memory that kernels may touch from now on: (address, bytes, writable, name)");
    m.def("widen_fp8", [](uint32_t code) { return unpack<Half>(widen_fp8(code)).x; });
    m.def("narrow_fp8", [](float x) { return narrow_fp8(x, 0.0f) & 0xffu; });
    m.def(
        "angles_of_16_keys",
        [](int first, uint64_t turns) {
            const int64_t half = half_of(static_cast<int64_t>(turns));
            CosSin keys[16];
            for (int g = 0; g < 8; ++g)
                angles_around(middle_angle(first, half), distance_angle(g, half), keys[7 - g], keys[8 + g]);
            std::vector<std::pair<float, float>> angles;
            for (const CosSin& x : keys) angles.emplace_back(x.cos, x.sin);
            return angles;
        },
        "(cos, sin) of the keys from position `first` on, as the decode kernels have them");
    m.def("seed", [](uint64_t seed) { Machine::get().seed(seed); });
    m.def(
        "multiprocessor_shared", [](int bytes) { Machine::get().multiprocessor_shared = bytes; },
        "bytes of shared memory that a multiprocessor has from now on");
    m.def("take_counters", [] {
        const emulator::Counters c = Machine::get().take_counters();
        py::dict counts;
        counts["blocks"] = c.blocks;
        counts["switches"] = c.switches;
        counts["products"] = c.products;
        counts["matrix_loads"] = c.matrix_loads;
        counts["bank_conflicts"] = c.bank_conflicts;
        return counts;
    });
#endif
}
