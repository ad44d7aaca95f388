// Kernels with one mistake each. The emulator must name it; a GPU would give wrong numbers now and then, or hang.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "../../csrc/cuda/primitives.cuh"
#include "../../csrc/emulator/machine.h"

using namespace longrope;

namespace {

struct Memory {
    const Vec16* input;  // 64 of them
    float* output;       // 64
};

using Kernel = void (*)(Memory);

// Each thread of two warps hands a word to its mirror image in the other.
void exchange(Memory m, bool before, bool after) {
    const int t = thread_index();
    store_shared<float>(4 * t, static_cast<float>(t));
    if (before) block_sync();
    const float x = load_shared<float>(4 * (63 - t));
    if (after) block_sync();
    store_shared<float>(4 * t, x);
    block_sync();
    store_global(m.output + t, load_shared<float>(4 * t));
}

// A copy lands in shared memory and is read by the other warp.
void copied(Memory m, bool waits, bool syncs) {
    const int t = thread_index();
    copy_async<16>(16 * t, m.input + t, true);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    if (syncs) block_sync();
    store_global(m.output + t, load_shared<float>(16 * (63 - t)));
    copy_async_wait<0>();
}

const std::map<std::string, Kernel> kKernels = {
    {"correct exchange", [](Memory m) { exchange(m, true, true); }},
    {"correct copy", [](Memory m) { copied(m, true, true); }},
    {"no barrier between write and read", [](Memory m) { exchange(m, false, true); }},
    {"no barrier between read and write", [](Memory m) { exchange(m, true, false); }},
    {"no wait for a copy", [](Memory m) { copied(m, false, true); }},
    {"no barrier after the wait for a copy", [](Memory m) { copied(m, true, false); }},
    {"a wait that leaves the group in flight",
     [](Memory m) {
         const int t = thread_index();
         copy_async<16>(16 * t, m.input + t, true);
         copy_async_commit();
         copy_async_wait<1>();
         store_global(m.output + t, load_shared<float>(16 * t));
         copy_async_wait<0>();
     }},
    {"a wait for a group that was not committed",
     [](Memory m) {
         const int t = thread_index();
         copy_async<16>(16 * t, m.input + t, true);
         copy_async_wait<0>();
         store_global(m.output + t, load_shared<float>(16 * t));
     }},
    {"a copy into what others still read",
     [](Memory m) {
         const int t = thread_index();
         store_shared(16 * t, Vec16{});
         block_sync();
         const float x = load_shared<float>(16 * (63 - t));
         copy_async<16>(16 * t, m.input + t, true);
         copy_async_commit();
         copy_async_wait<0>();
         store_global(m.output + t, x);
     }},
    {"an end with a copy in flight",
     [](Memory m) {
         copy_async<16>(16 * thread_index(), m.input + thread_index(), true);
         copy_async_commit();
     }},
    {"no warp barrier between lanes",
     [](Memory m) {
         const int t = thread_index();
         store_shared<float>(4 * t, 1.0f);
         store_global(m.output + t, load_shared<float>(4 * (t ^ 1)));
     }},
    {"a read of memory that nothing wrote",
     [](Memory m) { store_global(m.output + thread_index(), load_shared<float>(4 * thread_index())); }},
    {"a shared address past the end", [](Memory) { store_shared<float>(4096 + 4 * thread_index(), 1.0f); }},
    {"a misaligned shared address", [](Memory) { store_shared(16 * thread_index() + 4, Vec16{}); }},
    {"a read one past the end", [](Memory m) { load_global(m.input + thread_index() + 1); }},
    {"a write one past the end", [](Memory m) { store_global(m.output + thread_index() + 1, 0.0f); }},
    {"a write to an input", [](Memory m) { store_global(const_cast<Vec16*>(m.input) + thread_index(), Vec16{}); }},
    {"a misaligned global address",
     [](Memory m) { load_global(reinterpret_cast<const Vec16*>(reinterpret_cast<const float*>(m.input) + 1)); }},
    {"a barrier that half of the block reaches",
     [](Memory) {
         if (warp_index() == 0) block_sync();
     }},
    {"a named barrier with two counts", [](Memory) { named_sync(1, warp_index() == 0 ? 64 : 32); }},
    {"a product that half of the warp reaches",
     [](Memory) {
         float d[4] = {};
         const uint32_t a[4] = {}, b[2] = {};
         if (lane_index() < 16) multiply_add<Half>(d, a, b);
     }},
    {"lanes of a warp at different instructions",
     [](Memory) {
         if (lane_index() < 16)
             shuffle_xor(1.0f, 1);
         else
             any_lane(true);
     }},
    {"lanes of a warp at different products",
     [](Memory) {
         float d[4] = {};
         const uint32_t a[4] = {}, b[2] = {};
         if (lane_index() < 16)
             multiply_add<Half>(d, a, b);
         else
             multiply_add<Half>(d, a, b);
     }},
    {"an arrival that does not wait, and a reader that does",
     [](Memory m) {
         const int t = thread_index();
         if (warp_index() == 0) {
             store_shared<float>(4 * t, 1.0f);
             named_arrive(2, 64);
         } else {
             named_sync(2, 64);
             store_global(m.output + t, load_shared<float>(4 * (t - 32)));
         }
     }},
    {"a write after the arrival",
     [](Memory m) {
         const int t = thread_index();
         if (warp_index() == 0) {
             named_arrive(2, 64);
             store_shared<float>(4 * t, 1.0f);
         } else {
             named_sync(2, 64);
             store_global(m.output + t, load_shared<float>(4 * (t - 32)));
         }
     }},
};

}  // namespace

PYBIND11_MODULE(_misuse, m) {
    m.def(
        "run",
        [](const std::string& name, uint64_t seed) {
            alignas(16) static Vec16 input[64];
            alignas(16) static float output[64];
            emulator::Machine& machine = emulator::Machine::get();
            machine.seed(seed);
            const auto begin = [](auto* x) { return reinterpret_cast<uintptr_t>(x); };
            machine.global.declare({{begin(input), begin(input + 64), false, "input"},
                                    {begin(output), begin(output + 64), true, "output"}});
            launch(kKernels.at(name), 1, 64, 4096, Memory{input, output}, nullptr);
            return std::string();
        },
        pybind11::arg("name"), pybind11::arg("seed"));
    pybind11::list names;
    for (const auto& [name, kernel] : kKernels) names.append(name);
    m.attr("NAMES") = names;
}
