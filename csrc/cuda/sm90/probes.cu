// As probes.cu, for the instructions of sm_90a: where a bulk copy puts the elements of a box, and which elements of
// shared memory a matrix descriptor names.
#include "../kernels.h"

namespace longrope {
namespace {

constexpr int kImageBytes = 32 << 10;

struct TensorProbe {
    TensorMap map;
    int32_t at[kMaxTensorRank];
    int32_t bytes;
    void* out;
};

template <int kRank>
LONGROPE_KERNEL(32)
probe_copy_tensor_kernel(const LONGROPE_GRID_CONSTANT TensorProbe p) {
    constexpr SharedAddress kBarrier = kImageBytes;
    int32_t at[kRank];
#pragma unroll
    for (int i = 0; i < kRank; ++i) at[i] = p.at[i];
    if (thread_index() == 0) {
        mbarrier_init(kBarrier, 1);
        proxy_fence();
    }
    block_sync();
    if (thread_index() == 0) {
        mbarrier_expect(kBarrier, p.bytes);
        copy_tensor(0, p.map, at, kBarrier);
    }
    mbarrier_wait(kBarrier, 0);
    for (int i = thread_index(); i < p.bytes / 16; i += 32)
        store_global(static_cast<Vec16*>(p.out) + i, load_shared<Vec16>(16 * i));
}

LONGROPE_DEVICE MatrixDescriptor descriptor_of(const GroupProbe::Matrix& m) {
    return matrix_descriptor(m.start, m.leading_bytes, m.stride_bytes, static_cast<Swizzle>(m.swizzle));
}

template <class T, int kTiles, bool kRegisters, bool kTransposedA, bool kTransposedB>
LONGROPE_KERNEL(128)
probe_group_kernel(const GroupProbe p) {
    const int t = thread_index();
    for (int i = t; i < kImageBytes / 16; i += 128)
        store_shared(16 * i, load_global(static_cast<const Vec16*>(p.image) + i));
    float d[kTiles][4];
    float* memory = p.d + t * kTiles * 4;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) d[i / 4][i % 4] = load_global(memory + i);
    proxy_fence();
    block_sync();
    if constexpr (kRegisters) {
        uint32_t a[1][4];
        const Vec16 loaded = load_global(static_cast<const Vec16*>(p.registers) + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[0][i] = loaded.word[i];
        group_fence();
        group_multiply_add<T, kTransposedB>(d, a[0], descriptor_of(p.right), p.accumulate != 0);
        group_commit();
        group_wait<0>(d, a);
    } else {
        group_fence();
        group_multiply_add<T, kTransposedB, kTransposedA>(d, descriptor_of(p.left), descriptor_of(p.right),
                                                          p.accumulate != 0);
        group_commit();
        group_wait<0>(d);
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) store_global(memory + i, d[i / 4][i % 4]);
}

template <class T, int kTiles>
void run_group(const GroupProbe& p, Stream stream) {
    const auto go = [&](auto kernel) { launch(kernel, 1, 128, kImageBytes, p, stream); };
    const bool a = p.left.transposed != 0, b = p.right.transposed != 0;
    if (p.registers != nullptr) {
        if (b) return go(probe_group_kernel<T, kTiles, true, false, true>);
        return go(probe_group_kernel<T, kTiles, true, false, false>);
    }
    if (a && b) return go(probe_group_kernel<T, kTiles, false, true, true>);
    if (a) return go(probe_group_kernel<T, kTiles, false, true, false>);
    if (b) return go(probe_group_kernel<T, kTiles, false, false, true>);
    go(probe_group_kernel<T, kTiles, false, false, false>);
}

template <class T>
void run_columns(const GroupProbe& p, Stream stream) {
    if (p.columns == 64) return run_group<T, 8>(p, stream);
    if (p.columns == 96) return run_group<T, 12>(p, stream);
    if (p.columns == 128) return run_group<T, 16>(p, stream);
    run_group<T, 32>(p, stream);
}

}  // namespace

void probe_group_multiply(const GroupProbe& params, Stream stream) {
    if (params.dtype == Dtype::kFloat16) return run_columns<Half>(params, stream);
    run_columns<BFloat16Bits>(params, stream);
}

void probe_copy_tensor(const TensorShape& shape, const int32_t* at, void* out, Stream stream) {
    if (shape.box_bytes() > kImageBytes) throw std::runtime_error("a box of more bytes than the probe has");
    TensorProbe p{tensor_map(shape), {}, static_cast<int32_t>(shape.box_bytes()), out};
    for (int i = 0; i < shape.rank; ++i) p.at[i] = at[i];
    const auto go = [&](auto kernel) { launch(kernel, 1, 32, kImageBytes + 8, p, stream); };
    if (shape.rank == 2) return go(probe_copy_tensor_kernel<2>);
    if (shape.rank == 3) return go(probe_copy_tensor_kernel<3>);
    if (shape.rank == 4) return go(probe_copy_tensor_kernel<4>);
    go(probe_copy_tensor_kernel<5>);
}

}  // namespace longrope
