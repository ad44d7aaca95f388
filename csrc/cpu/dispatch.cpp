#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace longrope {
namespace {

#if defined(LONGROPE_X86)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif
bool always() {
    return true;
}

struct Level {
    Kernels kernels;
    bool (*present)();
};

#define LONGROPE_KERNELS(level) \
    {#level, attention_forward_##level, attention_backward_##level, cache_append_##level, apply_rope_##level}

const Level kLevels[] = {
#if defined(LONGROPE_X86)
    {LONGROPE_KERNELS(avx512_bf16), has_avx512_bf16},
    {LONGROPE_KERNELS(avx512), has_avx512},
    {LONGROPE_KERNELS(avx2), has_avx2},
#endif
    {LONGROPE_KERNELS(portable), always},
};

std::atomic<int64_t> call_counts[sizeof kLevels / sizeof *kLevels];

}  // namespace

LevelNames usable_levels() {
    LevelNames result{{}, 0};
    for (const Level& level : kLevels)
        if (level.present()) result.names[result.count++] = level.kernels.level;
    return result;
}

const Kernels& kernels(const char* name) {
    for (const Level& level : kLevels)
        if (level.present() && (*name == '\0' || std::strcmp(name, level.kernels.level) == 0)) {
            call_counts[&level - kLevels].fetch_add(1, std::memory_order_relaxed);
            return level.kernels;
        }
    std::string known;
    const LevelNames usable = usable_levels();
    for (int i = 0; i < usable.count; ++i) known += (i ? ", " : "") + std::string(usable.names[i]);
    throw std::invalid_argument("LONGROPE_KERNELS_CPU_LEVEL: got '" + std::string(name) +
                                "', expected one that this processor and build have: " + known);
}

int64_t calls(const char* name) {
    for (const Level& level : kLevels)
        if (std::strcmp(name, level.kernels.level) == 0) return call_counts[&level - kLevels];
    return 0;
}

}  // namespace longrope
