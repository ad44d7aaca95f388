// A stack of its own for every thread of a block, and the switch between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace longrope::emulator {

// Where a fiber goes on when it is switched to.
struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// Makes `fiber` run `entry`, which must never return, on the given stack.
void prepare(Fiber& fiber, void (*entry)(), uint8_t* stack, size_t bytes);

// Leaves `from` where it is and goes on with `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace longrope::emulator
