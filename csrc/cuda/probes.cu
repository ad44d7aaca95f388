// Kernels of one warp that show where an instruction puts its elements: run on a GPU they dump the truth, run in the
// emulator they are compared with the tables of the PTX manual.
#include "kernels.h"
#include "primitives.cuh"

namespace longrope {
namespace {

LONGROPE_KERNEL(32) probe_load_matrices_kernel(const ProbeParams p) {
    const int lane = lane_index();
    store_shared(lane * 16, load_global(static_cast<const Vec16*>(p.a) + lane));
    block_sync();
    Vec16 loaded;
    if (p.transposed)
        load_matrices_transposed(loaded.word, lane * 16);
    else
        load_matrices(loaded.word, lane * 16);
    store_global(static_cast<Vec16*>(p.out) + lane, loaded);
}

template <class T>
LONGROPE_KERNEL(32)
probe_multiply_add_kernel(const ProbeParams p) {
    const int lane = lane_index();
    const Vec16 a = load_global(static_cast<const Vec16*>(p.a) + lane);
    const Vec8 b = load_global(static_cast<const Vec8*>(p.b) + lane);
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = load_global(static_cast<const float*>(p.c) + 4 * lane + i);
    multiply_add<T>(d, a.word, b.word);
#pragma unroll
    for (int i = 0; i < 4; ++i) store_global(static_cast<float*>(p.out) + 4 * lane + i, d[i]);
}

}  // namespace

void probe_load_matrices(const ProbeParams& params, Stream stream) {
    launch(probe_load_matrices_kernel, 1, 32, 512, params, stream);
}

void probe_multiply_add(const ProbeParams& params, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return launch(probe_multiply_add_kernel<Half>, 1, 32, 0, params, stream);
    launch(probe_multiply_add_kernel<BFloat16Bits>, 1, 32, 0, params, stream);
}

}  // namespace longrope
