// The Python face of the CPU kernels: addresses, strides and sizes in, nothing else. No framework is linked.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../cpu/kernels.h"
#include "../cpu/parallel.h"
#include "../cpu/probes.h"

namespace py = pybind11;
using namespace longrope;

namespace {

// (address, batch stride, head stride, token stride), strides in elements.
Operand operand(const py::tuple& t) {
    return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            t[3].cast<int64_t>()};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (turns, base_turns, start_tokens, attention_factor, regime_index) addresses, pairs, interleaved.
Rotation rotation(const py::tuple& t) {
    return {pointer<const int64_t>(t[0].cast<uintptr_t>()),
            pointer<const int64_t>(t[1].cast<uintptr_t>()),
            pointer<const int64_t>(t[2].cast<uintptr_t>()),
            pointer<const float>(t[3].cast<uintptr_t>()),
            pointer<const int32_t>(t[4].cast<uintptr_t>()),
            t[5].cast<int32_t>(),
            t[6].cast<int32_t>()};
}

// (input, output, positions address, positions batch stride, heads, tokens)
RopeOperand rope_operand(const py::tuple& t) {
    return {operand(t[0].cast<py::tuple>()),
            operand(t[1].cast<py::tuple>()),
            pointer<const int64_t>(t[2].cast<uintptr_t>()),
            t[3].cast<int64_t>(),
            t[4].cast<int64_t>(),
            t[5].cast<int64_t>()};
}

void apply_rope(const std::string& level, const py::tuple& query, const py::tuple& key, const py::tuple& tables,
                int64_t batch, int64_t head_dim, int dtype, bool conjugate, int threads) {
    const RopeParams params{{rope_operand(query), rope_operand(key)},
                            rotation(tables),
                            batch,
                            head_dim,
                            static_cast<Dtype>(dtype),
                            conjugate,
                            threads};
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.apply_rope(params);
}

void attention_forward(const std::string& level, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                       const py::tuple& out, uintptr_t lse, const py::tuple& tables, uintptr_t query_positions,
                       uintptr_t key_positions, uintptr_t query_start, uintptr_t key_start, uintptr_t key_length,
                       const py::tuple& sizes, int64_t window_left, int64_t window_right, float scale, float softcap,
                       int dtype, int threads) {
    AttentionParams params{};
    params.query = operand(query);
    params.key = operand(key);
    params.value = operand(value);
    params.out = operand(out);
    params.lse = pointer<float>(lse);
    params.rotation = rotation(tables);
    params.query_positions = pointer<const int64_t>(query_positions);
    params.key_positions = pointer<const int64_t>(key_positions);
    params.query_start = pointer<const int64_t>(query_start);
    params.key_start = pointer<const int64_t>(key_start);
    params.key_length = pointer<const int64_t>(key_length);
    params.batch = sizes[0].cast<int64_t>();
    params.query_heads = sizes[1].cast<int64_t>();
    params.key_heads = sizes[2].cast<int64_t>();
    params.query_tokens = sizes[3].cast<int64_t>();
    params.key_tokens = sizes[4].cast<int64_t>();
    params.head_dim = sizes[5].cast<int64_t>();
    params.window_left = window_left;
    params.window_right = window_right;
    params.scale = scale;
    params.softcap = softcap;
    params.dtype = static_cast<Dtype>(dtype);
    params.threads = threads;
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.attention_forward(params);
}

py::list levels() {
    py::list names;
    const LevelNames usable = usable_levels();
    for (int i = 0; i < usable.count; ++i) names.append(usable.names[i]);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of longrope_kernels; call them through longrope_kernels.backends.cpu";
    m.def("apply_rope", &apply_rope);
    m.def("attention_forward", &attention_forward);
    m.def("levels", &levels, "instruction sets this build has and this processor can run, best first");
    m.def("thread_pool", &thread_pool_name, "where kernels run: 'openmp' (the process's own pool) or 'threads'");
    m.def("probe_fma", &probe_fma, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "fp32 multiply-adds on registers alone, in GFLOP/s");
    m.def("probe_bf16", &probe_bf16, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "bf16 pair products on registers alone, in GFLOP/s; 0 where the processor has none");
    m.def("probe_read", &probe_read, py::arg("threads"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>(),
          "reading `bytes` of memory once, in GB/s");
}
