// The Python face of the CPU kernels: addresses, strides and sizes in, nothing else. No framework is linked.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "../cpu/parallel.h"
#include "../cpu/probes.h"
#include "arguments.h"

using namespace longrope;

namespace {

void apply_rope(const std::string& level, const py::tuple& query, const py::tuple& key, const py::tuple& tables,
                int64_t batch, int64_t head_dim, int dtype, bool conjugate, int threads) {
    const RopeParams params = rope_params(query, key, tables, batch, head_dim, dtype, conjugate, threads);
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.apply_rope(params);
}

void cache_append(const std::string& level, const py::tuple& arguments) {
    const AppendParams params = append_params(arguments);
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.cache_append(params);
}

void attention_forward(const std::string& level, const py::tuple& arguments) {
    const AttentionParams params = attention_params(arguments);
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.attention_forward(params);
}

// `inv_freq`: address of float64[batch, pairs], zeros to be added to; 0: not wanted.
void attention_backward(const std::string& level, const py::tuple& arguments, const py::tuple& grad_out,
                        uintptr_t grad_lse, const py::tuple& grad_query, const py::tuple& grad_key,
                        const py::tuple& grad_value, uintptr_t inv_freq) {
    const AttentionBackwardParams params{attention_params(arguments), operand(grad_out), pointer<const float>(grad_lse),
                                         operand(grad_query),         operand(grad_key), operand(grad_value),
                                         pointer<double>(inv_freq)};
    const Kernels& chosen = kernels(level.c_str());
    py::gil_scoped_release release;
    chosen.attention_backward(params);
}

py::list levels() {
    py::list names;
    const LevelNames usable = usable_levels();
    for (int i = 0; i < usable.count; ++i) names.append(usable.names[i]);
    return names;
}

py::dict calls_by_level() {
    py::dict result;
    const LevelNames usable = usable_levels();
    for (int i = 0; i < usable.count; ++i) result[usable.names[i]] = calls(usable.names[i]);
    return result;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of longrope_kernels; call them through longrope_kernels.backends.cpu";
    m.def("apply_rope", &apply_rope);
    m.def("attention_forward", &attention_forward);
    m.def("attention_backward", &attention_backward);
    m.def("cache_append", &cache_append);
    m.attr("KEY_GROUP") = kKeyGroup;
    m.def("levels", &levels, "instruction sets this build has and this processor can run, best first");
    m.def("calls", &calls_by_level, "how many calls each of `levels` has served");
    m.attr("SANITIZED") = kSanitized;
    m.def("thread_pool", &thread_pool_name, "where kernels run: 'openmp' (the process's own pool) or 'threads'");
    m.def(
        "advise_huge_pages",
        [](uintptr_t data, int64_t bytes) { return advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
        py::arg("data"), py::arg("bytes"), "ask for huge pages in this memory; whether the system has any to give");
    m.def("probe_fma", &probe_fma, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "fp32 multiply-adds on registers alone, in GFLOP/s");
    m.def("probe_bf16", &probe_bf16, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "bf16 pair products on registers alone, in GFLOP/s; 0 where the processor has none");
    m.def("probe_read", &probe_read, py::arg("threads"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>(),
          "reading `bytes` of memory once, in GB/s");
    m.def("probe_read_multiply", &probe_read_multiply, py::arg("threads"), py::arg("bytes"), py::arg("multiplications"),
          py::call_guard<py::gil_scoped_release>(),
          "the same from two places in turn, with as many vector multiply-adds on registers for every 512 bytes, in "
          "GB/s; "
          "0 where the processor has no AVX-512");
}
