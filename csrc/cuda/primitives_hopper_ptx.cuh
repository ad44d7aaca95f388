// primitives.cuh on the device: what Hopper has besides (sm_90a). Included by primitives_ptx.cuh.
#pragma once

#include <cuda.h>

namespace longrope {

inline int multiprocessor_count() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "the current device");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors");
    return count;
}

LONGROPE_DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_window(barrier)), "r"(arrivals) : "memory");
}
LONGROPE_DEVICE void mbarrier_arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_window(barrier)) : "memory");
}
LONGROPE_DEVICE void mbarrier_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_window(barrier)), "r"(bytes)
                 : "memory");
}
LONGROPE_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t"
        "}" ::"r"(shared_window(barrier)),
        "r"(parity)
        : "memory");
}
LONGROPE_DEVICE void proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The driver's function, found when it is first needed: the module links no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
              "the driver's cuTensorMapEncodeTiled");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
              "the driver's cuTensorMapEncodeTiled");
#endif
        if (found != cudaDriverEntryPointSuccess || entry == nullptr)
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled, it is older than CUDA 12");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    }();
    return encoder;
}

inline TensorMap tensor_map(const TensorShape& shape) {
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "a tensor map is a CUtensorMap");
    cuuint64_t size[kMaxTensorRank];
    cuuint32_t box[kMaxTensorRank], step[kMaxTensorRank];
    cuuint64_t stride[kMaxTensorRank - 1];
    for (int i = 0; i < shape.rank; ++i) {
        size[i] = shape.size[i];
        box[i] = shape.box[i];
        step[i] = 1;
        if (i > 0) stride[i - 1] = shape.stride_bytes[i - 1];
    }
    const CUtensorMapSwizzle swizzle = shape.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : shape.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : shape.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                       : CU_TENSOR_MAP_SWIZZLE_NONE;
    TensorMap map;
    const CUresult status = tensor_map_encoder()(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16,
                                                 static_cast<cuuint32_t>(shape.rank), const_cast<void*>(shape.data),
                                                 size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("a tensor map is refused by the driver: error " + std::to_string(status));
    return map;
}

template <int kRank>
LONGROPE_DEVICE void copy_tensor(SharedAddress to, const TensorMap& map, const int32_t (&at)[kRank],
                                 SharedAddress barrier) {
    static_assert(kRank >= 2 && kRank <= kMaxTensorRank, "a bulk tensor copy of 2 to 5 dimensions");
    const uint64_t where = reinterpret_cast<uint64_t>(&map);
    const uint32_t destination = shared_window(to), mbarrier = shared_window(barrier);
#define LONGROPE_COPY(rank, coordinates, ...)                                       \
    asm volatile("cp.async.bulk.tensor." rank                                       \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], " \
                 "[%1, " coordinates "], [%2];" ::"r"(destination),                 \
                 "l"(where), "r"(mbarrier), __VA_ARGS__                             \
                 : "memory")
    if constexpr (kRank == 2)
        LONGROPE_COPY("2d", "{%3, %4}", "r"(at[0]), "r"(at[1]));
    else if constexpr (kRank == 3)
        LONGROPE_COPY("3d", "{%3, %4, %5}", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    else if constexpr (kRank == 4)
        LONGROPE_COPY("4d", "{%3, %4, %5, %6}", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    else
        LONGROPE_COPY("5d", "{%3, %4, %5, %6, %7}", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef LONGROPE_COPY
}

LONGROPE_DEVICE MatrixDescriptor matrix_descriptor(SharedAddress start, uint32_t leading_bytes, uint32_t stride_bytes,
                                                   Swizzle swizzle) {
    return uint64_t{(shared_window(start) & 0x3ffff) >> 4} | uint64_t{(leading_bytes & 0x3ffff) >> 4} << 16 |
           uint64_t{(stride_bytes & 0x3ffff) >> 4} << 32 | static_cast<uint64_t>(swizzle) << 62;
}

LONGROPE_DEVICE void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
LONGROPE_DEVICE void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Ties registers to this place, so that the compiler moves no use of them above it.
template <int kTiles>
LONGROPE_DEVICE void tie(float (&d)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]));
}
template <int kTiles>
LONGROPE_DEVICE void tie(uint32_t (&a)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]));
}
template <int kPending, class... Registers>
LONGROPE_DEVICE void group_wait(Registers&... landed) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (tie(landed), ...);
}

template <int kCount>
LONGROPE_DEVICE void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
LONGROPE_DEVICE void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// One wgmma of `tiles` tiles of 8 columns. Operands of the asm: the accumulators, then A (a descriptor, or 4
// registers), the descriptor of B, whether to accumulate.
template <class T, int kTiles>
struct GroupProduct;

#define LONGROPE_TILE(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LONGROPE_TILES_4(j) LONGROPE_TILE(j), LONGROPE_TILE(j + 1), LONGROPE_TILE(j + 2), LONGROPE_TILE(j + 3)
#define LONGROPE_TILES_8(j) LONGROPE_TILES_4(j), LONGROPE_TILES_4(j + 4)
#define LONGROPE_TILES_12(j) LONGROPE_TILES_8(j), LONGROPE_TILES_4(j + 8)
#define LONGROPE_TILES_16(j) LONGROPE_TILES_8(j), LONGROPE_TILES_8(j + 8)
#define LONGROPE_TILES_32(j) LONGROPE_TILES_16(j), LONGROPE_TILES_16(j + 16)
#define LONGROPE_NAMES_A                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", "                                                                   \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGROPE_NAMES_B "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LONGROPE_NAMES_C "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGROPE_NAMES_D                                                                         \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
    ", "                                                                                         \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
    ", "                                                                                         \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", "                                                                                         \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LONGROPE_NAMES_8 LONGROPE_NAMES_A
#define LONGROPE_NAMES_12 LONGROPE_NAMES_8 ", " LONGROPE_NAMES_B
#define LONGROPE_NAMES_16 LONGROPE_NAMES_12 ", " LONGROPE_NAMES_C
#define LONGROPE_NAMES_32 LONGROPE_NAMES_16 ", " LONGROPE_NAMES_D

// i0 to i5: the numbers of the operands behind the accumulators.
#define LONGROPE_GROUP_PRODUCT(T, type, tiles, columns, i0, i1, i2, i3, i4, i5)                                     \
    template <>                                                                                                     \
    struct GroupProduct<T, tiles> {                                                                                 \
        template <int kTransposedA, int kTransposedB>                                                               \
        LONGROPE_DEVICE static void run(float (&d)[tiles][4], uint64_t a, uint64_t b, int accumulate) {             \
            asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #i2                                           \
                         ", 0;\n\t"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                      \
                         " {" LONGROPE_NAMES_##tiles "}, %" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 ";\n\t}"   \
                         : LONGROPE_TILES_##tiles(0)                                                                \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposedA), "n"(kTransposedB));                  \
        }                                                                                                           \
        template <int kTransposedB>                                                                                 \
        LONGROPE_DEVICE static void run(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
            asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %" #i5                                           \
                         ", 0;\n\t"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                      \
                         " {" LONGROPE_NAMES_##tiles "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4           \
                                                     ", add, 1, 1, %" LONGROPE_NEXT_##tiles ";\n\t}"                \
                         : LONGROPE_TILES_##tiles(0)                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposedB)); \
        }                                                                                                           \
    };
#define LONGROPE_NEXT_8 "38"
#define LONGROPE_NEXT_12 "54"
#define LONGROPE_NEXT_16 "70"
#define LONGROPE_NEXT_32 "134"
#define LONGROPE_GROUP_PRODUCTS(T, type)                             \
    LONGROPE_GROUP_PRODUCT(T, type, 8, 64, 32, 33, 34, 35, 36, 37)   \
    LONGROPE_GROUP_PRODUCT(T, type, 12, 96, 48, 49, 50, 51, 52, 53)  \
    LONGROPE_GROUP_PRODUCT(T, type, 16, 128, 64, 65, 66, 67, 68, 69) \
    LONGROPE_GROUP_PRODUCT(T, type, 32, 256, 128, 129, 130, 131, 132, 133)
LONGROPE_GROUP_PRODUCTS(BFloat16Bits, "bf16")
LONGROPE_GROUP_PRODUCTS(Half, "f16")

template <class T, bool kTransposedB = false, bool kTransposedA = false, int kTiles>
LONGROPE_DEVICE void group_multiply_add(float (&d)[kTiles][4], MatrixDescriptor a, MatrixDescriptor b,
                                        bool accumulate) {
    GroupProduct<T, kTiles>::template run<kTransposedA, kTransposedB>(d, a, b, accumulate);
}
template <class T, bool kTransposedB = false, int kTiles>
LONGROPE_DEVICE void group_multiply_add(float (&d)[kTiles][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                        bool accumulate) {
    GroupProduct<T, kTiles>::template run<kTransposedB>(d, a, b, accumulate);
}

}  // namespace longrope
