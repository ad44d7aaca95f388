// Kernels of two or three warpgroups with one mistake each in their use of mbarriers, bulk copies, wgmma or setmaxnreg.
#include <pybind11/pybind11.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/primitives.cuh"
#include "../../csrc/emulator/machine.h"

using namespace longrope;

namespace {

constexpr int kThreads = 256, kTile = 64 * 128;  // bytes of 64 rows of 64 elements
constexpr SharedAddress kFull = 2 * kTile, kEmpty = kFull + 8, kBytes = kEmpty + 8;

struct Memory {
    TensorMap map;  // of 256 rows of 64 elements, boxes of 64
    float* output;  // [kThreads]
};

using Kernel = void (*)(const Memory&);

// What a correct use may be told to leave out.
enum Flaw {
    kNone,
    kNoWait,
    kParity,
    kNoBytes,
    kManyBytes,
    kFewArrivals,
    kManyArrivals,
    kNoSync,
    kNoFence,
    kReaders,
    kWritten,
    kMisaligned,
    kEnd,
    kRank,
    kLeftInFlight,
    kNoCommit,
    kNoProxyFence,
    kAccumulator,
    kLeft,
    kOperands,
    kOperandsLate,
    kThreeWarps,
    kDifferent,
    kPattern,
};

// One thread brings a tile that all read.
void copied(const Memory& m, Flaw flaw) {
    const int t = thread_index();
    if (t == 0) {
        mbarrier_init(kFull, flaw == kFewArrivals ? 2 : 1);
        if (flaw != kNoFence) proxy_fence();
    }
    if (flaw == kWritten && t == 0) store_shared<float>(0, 1.0f);
    float early = 0.0f;
    if (flaw == kReaders) {
        store_shared<float>(4 * t, 1.0f);
        proxy_fence();
        block_sync();
        early = load_shared<float>(4 * (kThreads - 1 - t));
    } else if (flaw != kNoSync) {
        block_sync();
    }
    if (t == (flaw == kNoSync ? 255 : 0)) {
        if (flaw != kNoBytes) mbarrier_expect(kFull, flaw == kManyBytes ? kTile + 16 : kTile);
        if (flaw == kNoBytes || flaw == kManyArrivals) mbarrier_arrive(kFull);
        if (flaw == kRank)
            copy_tensor<3>(0, m.map, {0, 0, 0}, kFull);
        else
            copy_tensor<2>(flaw == kMisaligned ? 64 : 0, m.map, {0, 64}, kFull);
    }
    if (flaw == kEnd) return;
    if (flaw != kNoWait) mbarrier_wait(kFull, flaw == kParity ? 1 : 0);
    store_global(m.output + t, load_shared<float>(4 * t) + early);
}

// A producer fills two stages in turn, 8 tiles in all, for consumers of the other warpgroup.
void ring(const Memory& m) {
    const int t = thread_index();
    const auto stage = [](int tile) { return static_cast<SharedAddress>(tile % 2); };
    constexpr SharedAddress kBarriers = 2 * kTile;
    if (t == 0) {
        for (int s = 0; s < 2; ++s) {
            mbarrier_init(kBarriers + 16 * s, 1);
            mbarrier_init(kBarriers + 16 * s + 8, 4);
        }
        proxy_fence();
    }
    block_sync();
    for (int tile = 0; tile < 8; ++tile) {
        const SharedAddress at = stage(tile), full = kBarriers + 16 * at, empty = full + 8;
        const uint32_t parity = tile / 2 % 2;
        if (warp_index() == 0 && lane_index() == 0) {
            mbarrier_wait(empty, parity ^ 1);
            mbarrier_expect(full, kTile);
            copy_tensor<2>(at * kTile, m.map, {0, 32 * tile}, full);
        } else if (warp_index() >= 4) {
            mbarrier_wait(full, parity);
            store_global(m.output + t, load_shared<float>(at * kTile + 4 * (t - 128)));
            warp_sync();
            if (lane_index() == 0) mbarrier_arrive(empty);
        }
    }
}

// A warpgroup writes two operands of ones and multiplies them: 64 x 64 sums of 16.
void product(const Memory& m, Flaw flaw) {
    const int t = thread_index();
    if (t >= 128) return;
    const auto sync = [] { named_sync(1, 128); };
    for (int i = t; i < 2 * kTile / 4; i += 128) store_shared<uint32_t>(4 * i, 0x3f803f80u);
    if (flaw != kNoProxyFence) proxy_fence();
    if (flaw != kNoSync) sync();
    const MatrixDescriptor left = matrix_descriptor(0, 16, 1024, Swizzle::k128);
    const MatrixDescriptor right = matrix_descriptor(kTile + (flaw == kPattern ? 256 : 0), 16, 1024, Swizzle::k128);
    float d[8][4] = {};
    uint32_t a[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    if (flaw != kNoFence) group_fence();
    if (flaw == kLeft)
        group_multiply_add<BFloat16Bits>(d, a, right, true);
    else if (flaw == kDifferent && warp_index() == 2)
        group_multiply_add<BFloat16Bits>(d, right, left, true);
    else if (flaw != kThreeWarps || warp_index() != 3)
        group_multiply_add<BFloat16Bits>(d, left, right, true);
    if (flaw != kNoCommit) group_commit();
    if (flaw == kAccumulator) d[3][1] = 0.0f;
    if (flaw == kLeft) a[2] = 0;
    if (flaw == kOperands) store_shared<uint32_t>(4 * t, 0u);
    if (flaw == kNoWait) {
        float sum = 0.0f;
        for (auto& tile : d)
            for (float x : tile) sum += x;
        group_wait<0>();
        if (sum != 512.0f) throw std::runtime_error("wrong result");
    }
    if (flaw == kLeftInFlight)
        group_wait<1>(d);
    else
        group_wait<0>(d);
    if (flaw == kOperandsLate) store_shared<uint32_t>(4 * (127 - t), 0u);
    if (flaw == kThreeWarps) return;
    for (auto& tile : d)
        for (float x : tile)
            if (x != 16.0f) throw std::runtime_error("wrong result");
    store_global(m.output + t, d[0][0]);
}

const std::map<std::string, Kernel> kKernels = {
    {"correct copy", [](const Memory& m) { copied(m, kNone); }},
    {"correct ring", [](const Memory& m) { ring(m); }},
    {"correct product", [](const Memory& m) { product(m, kNone); }},
    {"correct registers",
     [](const Memory&) {
         if (warp_index() < 4)
             shrink_registers<40>();
         else
             grow_registers<232>();
     }},
    {"mbarrier: no wait", [](const Memory& m) { copied(m, kNoWait); }},
    {"mbarrier: the wrong parity", [](const Memory& m) { copied(m, kParity); }},
    {"mbarrier: no bytes expected", [](const Memory& m) { copied(m, kNoBytes); }},
    {"mbarrier: too many bytes expected", [](const Memory& m) { copied(m, kManyBytes); }},
    {"mbarrier: one arrival too few", [](const Memory& m) { copied(m, kFewArrivals); }},
    {"mbarrier: one arrival too many", [](const Memory& m) { copied(m, kManyArrivals); }},
    {"mbarrier: used before it is there", [](const Memory& m) { copied(m, kNoSync); }},
    {"mbarrier: no proxy fence after it was made", [](const Memory& m) { copied(m, kNoFence); }},
    {"copy: into what others still read", [](const Memory& m) { copied(m, kReaders); }},
    {"copy: over what a thread wrote, without a proxy fence",
     [](const Memory& m) {
         if (thread_index() == 0) {
             mbarrier_init(kFull, 1);
             proxy_fence();
             store_shared<float>(0, 1.0f);
             mbarrier_expect(kFull, kTile);
             copy_tensor<2>(0, m.map, {0, 0}, kFull);
             mbarrier_wait(kFull, 0);
         }
     }},
    {"copy: misaligned", [](const Memory& m) { copied(m, kMisaligned); }},
    {"copy: an end with one in flight", [](const Memory& m) { copied(m, kEnd); }},
    {"copy: another rank than the map", [](const Memory& m) { copied(m, kRank); }},
    {"wgmma: no wait", [](const Memory& m) { product(m, kNoWait); }},
    {"wgmma: a wait that leaves it in flight", [](const Memory& m) { product(m, kLeftInFlight); }},
    {"wgmma: no commit", [](const Memory& m) { product(m, kNoCommit); }},
    {"wgmma: no fence", [](const Memory& m) { product(m, kNoFence); }},
    {"wgmma: the accumulator is written in flight", [](const Memory& m) { product(m, kAccumulator); }},
    {"wgmma: registers of A are written in flight", [](const Memory& m) { product(m, kLeft); }},
    {"wgmma: no proxy fence after the operands", [](const Memory& m) { product(m, kNoProxyFence); }},
    {"wgmma: no barrier after the operands", [](const Memory& m) { product(m, kNoSync); }},
    {"wgmma: operands written in flight", [](const Memory& m) { product(m, kOperands); }},
    {"wgmma: operands written without a barrier", [](const Memory& m) { product(m, kOperandsLate); }},
    {"wgmma: three warps of four", [](const Memory& m) { product(m, kThreeWarps); }},
    {"wgmma: warps at different products", [](const Memory& m) { product(m, kDifferent); }},
    {"wgmma: a descriptor inside the swizzle's pattern", [](const Memory& m) { product(m, kPattern); }},
    {"registers: more than there are",
     [](const Memory&) {
         if (warp_index() < 4)
             shrink_registers<48>();
         else
             grow_registers<240>();
     }},
    {"registers: no multiple of 8", [](const Memory&) { shrink_registers<44>(); }},
    {"registers: growing to fewer", [](const Memory&) { grow_registers<24>(); }},
};

}  // namespace

PYBIND11_MODULE(_misuse_hopper, m) {
    m.def(
        "run",
        [](const std::string& name, uint64_t seed) {
            alignas(16) static uint16_t input[256 * 64];
            alignas(16) static float output[kThreads];
            emulator::Machine& machine = emulator::Machine::get();
            machine.seed(seed);
            const auto begin = [](auto* x) { return reinterpret_cast<uintptr_t>(x); };
            machine.global.declare({{begin(input), begin(input + 256 * 64), false, "input"},
                                    {begin(output), begin(output + kThreads), true, "output"}});
            const TensorShape shape{input, 2, Swizzle::k128, {64, 256}, {64, 64}, {128}};
            const int threads = name.find("registers") == std::string::npos ? kThreads : 384;
            launch(kKernels.at(name), 1, threads, kBytes + 16, Memory{tensor_map(shape), output}, nullptr);
        },
        pybind11::arg("name"), pybind11::arg("seed"));
    pybind11::list names;
    for (const auto& [name, kernel] : kKernels) names.append(name);
    m.attr("NAMES") = names;
}
