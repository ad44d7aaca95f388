// The kernels of every instruction set this build has, and the choice among them at run time.
#pragma once

#include "../core/params.h"

// Each instruction set's copy of a function has its own name: attention_forward_avx2 and so on.
#define LONGROPE_JOIN_(name, level) name##_##level
#define LONGROPE_JOIN(name, level) LONGROPE_JOIN_(name, level)
#define LONGROPE_LEVEL(name) LONGROPE_JOIN(name, LONGROPE_ISA)

#define LONGROPE_DECLARE(level)                                      \
    void attention_forward_##level(const AttentionParams&);          \
    void attention_backward_##level(const AttentionBackwardParams&); \
    void cache_append_##level(const AppendParams&);                  \
    void apply_rope_##level(const RopeParams&);

namespace longrope {

LONGROPE_DECLARE(portable)
LONGROPE_DECLARE(avx2)
LONGROPE_DECLARE(avx512)
LONGROPE_DECLARE(avx512_bf16)

struct Kernels {
    const char* level;
    void (*attention_forward)(const AttentionParams&);
    void (*attention_backward)(const AttentionBackwardParams&);
    void (*cache_append)(const AppendParams&);
    void (*apply_rope)(const RopeParams&);
};

// The kernels of `level`, or of the best level this processor has for an empty name; counted as one call.
// Throws std::invalid_argument for a level that is unknown, not in this build, or not on this processor.
const Kernels& kernels(const char* level);

// Levels that this build has and this processor can run, best first; the rest are null.
struct LevelNames {
    const char* names[4];
    int count;
};
LevelNames usable_levels();

// How often `kernels` has handed out those of `level`, one of `usable_levels`: what ran, not what was asked for.
int64_t calls(const char* level);

}  // namespace longrope
