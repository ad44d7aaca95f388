#include "fiber.h"

namespace longrope::emulator {

#if defined(__x86_64__)

// The callee-saved registers of the System V ABI are what a switch must keep; the rest are dead across a call.
extern "C" void longrope_switch_stack(void** save, void* load);
asm(R"(
.text
.type longrope_switch_stack, @function
longrope_switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size longrope_switch_stack, .-longrope_switch_stack
)");

void prepare(Fiber& fiber, void (*entry)(), uint8_t* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // where `entry` would return to; its stack is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) {
    longrope_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Fiber& fiber, void (*entry)(), uint8_t* stack, size_t bytes) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) {
    swapcontext(&from.context, &to.context);
}

#endif

}  // namespace longrope::emulator
