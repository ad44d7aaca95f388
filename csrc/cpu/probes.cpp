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

namespace {

// Memory for `threads` workers of whole 512 bytes each, and the rate at which read(first byte, bytes) passes it.
template <class Read>
double read_rate(int threads, int64_t bytes, const Read& read) {
    const int64_t part = bytes / threads / 512 * 512, all = part * threads;
    const std::unique_ptr<char[], decltype(&std::free)> memory(static_cast<char*>(std::aligned_alloc(64, all + 64)),
                                                               &std::free);
    if (!memory) throw std::bad_alloc();
    advise_huge_pages(memory.get(), all);
    std::fill_n(reinterpret_cast<uint32_t*>(memory.get()), all / 4, 0x3f800000u);  // ones, in fp32
    std::atomic<uint64_t> sum{0};
    const auto start = Clock::now();
    run_workers(threads, [&](int worker) { sum += read(memory.get() + worker * part, part); });
    return sum == 0 ? 0.0 : static_cast<double>(all) / since(start) / 1e9;
}

#if defined(LONGROPE_X86)

#define CLOBBER_LINES "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27"

// Four lines of the first half, four of the second, 20 `groups` multiply-adds of what they hold; and so on.
__attribute__((target("avx512f"))) uint64_t read_and_multiply(const char* first, int64_t bytes, int groups) {
    const char *second = first + bytes / 2, *end = second;
    asm volatile("vpxord %%zmm31, %%zmm31, %%zmm31\n" ::: CLOBBER_512);
    for (; first < end; first += 256, second += 256) {
        asm volatile(
            "vmovups (%0), %%zmm20\nvmovups 64(%0), %%zmm21\nvmovups 128(%0), %%zmm22\nvmovups 192(%0), %%zmm23\n"
            "vmovups (%1), %%zmm24\nvmovups 64(%1), %%zmm25\nvmovups 128(%1), %%zmm26\nvmovups 192(%1), %%zmm27\n"
            :
            : "r"(first), "r"(second)
            : CLOBBER_LINES);
        for (int i = 0; i < groups; ++i)
            asm volatile(
                "vfmadd231ps %%zmm20, %%zmm31, %%zmm0\n"
                "vfmadd231ps %%zmm21, %%zmm31, %%zmm1\n"
                "vfmadd231ps %%zmm22, %%zmm31, %%zmm2\n"
                "vfmadd231ps %%zmm23, %%zmm31, %%zmm3\n"
                "vfmadd231ps %%zmm24, %%zmm31, %%zmm4\n"
                "vfmadd231ps %%zmm25, %%zmm31, %%zmm5\n"
                "vfmadd231ps %%zmm26, %%zmm31, %%zmm6\n"
                "vfmadd231ps %%zmm27, %%zmm31, %%zmm7\n"
                "vfmadd231ps %%zmm20, %%zmm31, %%zmm8\n"
                "vfmadd231ps %%zmm21, %%zmm31, %%zmm9\n"
                "vfmadd231ps %%zmm22, %%zmm31, %%zmm10\n"
                "vfmadd231ps %%zmm23, %%zmm31, %%zmm11\n"
                "vfmadd231ps %%zmm24, %%zmm31, %%zmm12\n"
                "vfmadd231ps %%zmm25, %%zmm31, %%zmm13\n"
                "vfmadd231ps %%zmm26, %%zmm31, %%zmm14\n"
                "vfmadd231ps %%zmm27, %%zmm31, %%zmm15\n"
                "vfmadd231ps %%zmm20, %%zmm31, %%zmm16\n"
                "vfmadd231ps %%zmm21, %%zmm31, %%zmm17\n"
                "vfmadd231ps %%zmm22, %%zmm31, %%zmm18\n"
                "vfmadd231ps %%zmm23, %%zmm31, %%zmm19\n" ::
                    : CLOBBER_512, CLOBBER_LINES);
    }
    return 1;
}

#endif

}  // namespace

double probe_read(int threads, int64_t bytes) {
    return read_rate(threads, bytes, [](const char* memory, int64_t part) {
        const auto* words = reinterpret_cast<const uint64_t*>(memory);
        uint64_t sum = 0;
        for (int64_t i = 0; i < part / 8; ++i) sum += words[i];
        return sum;
    });
}

// What a pass over keys and values can reach that does something with them: loads wait in one queue with the rest.
double probe_read_multiply(int threads, int64_t bytes, int multiplications) {
#if defined(LONGROPE_X86)
    const int groups = (multiplications + 10) / 20;
    if (__builtin_cpu_supports("avx512f"))
        return read_rate(threads, bytes,
                         [=](const char* memory, int64_t part) { return read_and_multiply(memory, part, groups); });
#endif
    (void)threads, (void)bytes, (void)multiplications;
    return 0.0;
}

}  // namespace longrope
