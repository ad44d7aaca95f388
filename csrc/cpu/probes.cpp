#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "memory.h"
#include "parallel.h"

namespace longrope {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

#if defined(LONGROPE_X86)

// Twenty independent chains: more than latency x throughput of the unit on any processor so far.
#define CHAINS(OP) \
    OP(0)          \
    OP(1)          \
    OP(2)          \
    OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11) OP(12) OP(13) OP(14) OP(15) OP(16) OP(17) OP(18) OP(19)
#define FMA512(n) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define BF16(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n"
#define CLOBBER_512                                                                                            \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm30", "xmm31"
#define FMA256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define CHAINS_12(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define CLOBBER_256 \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm14", "xmm15"

__attribute__((target("avx512f"))) void fma_512() {
    asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31\n" ::: CLOBBER_512);
    for (int i = 0; i < 10000; ++i) asm volatile(CHAINS(FMA512)::: CLOBBER_512);
}
__attribute__((target("avx512f"))) void bf16_512() {
    asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31\n" ::: CLOBBER_512);
    for (int i = 0; i < 10000; ++i) asm volatile(CHAINS(BF16)::: CLOBBER_512);
}
__attribute__((target("avx2,fma"))) void fma_256() {
    asm volatile("vpxor %%ymm14, %%ymm14, %%ymm14\nvpxor %%ymm15, %%ymm15, %%ymm15\n" ::: CLOBBER_256);
    for (int i = 0; i < 10000; ++i) asm volatile(CHAINS_12(FMA256)::: CLOBBER_256);
}

#endif

double rate(int threads, double seconds, void (*loop)(), double flop) {
    std::atomic<int64_t> loops{0};
    const auto start = Clock::now();
    run_workers(threads, [&](int) {
        int64_t mine = 0;
        do {
            loop();
            ++mine;
        } while (since(start) < seconds);
        loops += mine;
    });
    return static_cast<double>(loops) * flop / since(start) / 1e9;
}

}  // namespace

double probe_fma(int threads, double seconds) {
#if defined(LONGROPE_X86)
    if (__builtin_cpu_supports("avx512f")) return rate(threads, seconds, fma_512, 10000.0 * 20 * 32);
    if (__builtin_cpu_supports("fma")) return rate(threads, seconds, fma_256, 10000.0 * 12 * 16);
#endif
    (void)threads, (void)seconds;
    return 0.0;
}

// A pair product is 16 lanes x 2 products and 2 additions: 64 operations an instruction.
double probe_bf16(int threads, double seconds) {
#if defined(LONGROPE_X86)
    if (__builtin_cpu_supports("avx512bf16")) return rate(threads, seconds, bf16_512, 10000.0 * 20 * 64);
#endif
    (void)threads, (void)seconds;
    return 0.0;
}

double probe_read(int threads, int64_t bytes) {
    const int64_t words = bytes / 8 / threads, all = words * threads * 8;
    const std::unique_ptr<uint64_t[], decltype(&std::free)> memory(static_cast<uint64_t*>(std::malloc(all)),
                                                                   &std::free);
    if (!memory) throw std::bad_alloc();
    advise_huge_pages(memory.get(), all);
    std::fill_n(memory.get(), words * threads, 1);
    std::atomic<uint64_t> sum{0};
    const auto start = Clock::now();
    run_workers(threads, [&](int worker) {
        const uint64_t* part = memory.get() + worker * words;
        uint64_t mine = 0;
        for (int64_t i = 0; i < words; ++i) mine += part[i];
        sum += mine;
    });
    return sum == 0 ? 0.0 : static_cast<double>(words * threads * 8) / since(start) / 1e9;
}

}  // namespace longrope
