// Runs a kernel block by block on the host: every thread is a fiber, and nothing happens that PTX does not promise.
//
//   warps      a collective instruction (mma, ldmatrix, shuffle, vote) takes place when every lane it names has
//   arrived;
//              lanes that arrive at different ones are an error
//   barriers   named barriers with counts, as bar.sync and bar.arrive; a block that can go on nowhere is an error that
//              tells who waits where
//   copies     cp.async reads and lands when its group is waited for, not before, in an order that the seed varies
//   bulk       tensor copies land when no thread can go on without them; mbarriers count arrivals and bytes (bulk.h)
//   wgmma      reads and writes when its group is waited for (warpgroup.h)
//   order      one warp runs as far ahead of the others as it can; which one, and the order of the blocks, the seed
//   varies
//
// Blocks run one after another: races between blocks are not looked for.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "bulk.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "warpgroup.h"

namespace longrope::emulator {

constexpr int kBarriers = 16;
constexpr int kRegisters = 64 << 10;  // of a multiprocessor
constexpr int kReservedShared = 1 << 10;

// What was counted since the last time it was asked for.
struct Counters {
    int64_t blocks = 0, switches = 0, products = 0, matrix_loads = 0, bank_conflicts = 0;
};

// Memory for the stacks of a block's threads, touched only as deep as a kernel goes.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    ~Stacks();
    void reserve(int threads);
    uint8_t* of(int thread) const { return memory_ + thread * kBytes; }

    static constexpr size_t kBytes = 128 << 10;

  private:
    uint8_t* memory_ = nullptr;
    size_t bytes_ = 0;
};

class Machine {
  public:
    static Machine& get();

    void seed(uint64_t seed) { seed_ = seed; }
    Counters take_counters() { return std::exchange(counters, {}); }

    // Runs `kernel` once per thread of every block.
    void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

    int thread() const { return current_; }
    int threads() const { return static_cast<int>(threads_.size()); }
    int64_t block() const { return block_; }
    int64_t blocks() const { return blocks_; }

    // Runs `body(slots)` once, when all lanes of `mask` have arrived with the same name and immediate, each with its
    // own slot. `aligned`: they must be at the same line too.
    template <class Slot, class Body>
    void collective(const char* name, int64_t immediate, uint32_t mask, bool aligned, Slot& slot, Site site,
                    const Body& body) {
        void** slots = arrive(name, immediate, mask, aligned, &slot, site);
        if (slots == nullptr) return;  // another lane came last and did it
        body(reinterpret_cast<Slot**>(slots));
        release(mask);
    }

    void barrier(int id, int threads, bool wait, Site site);
    void warp_sync(Site site);

    template <class V>
    V read_shared(uint32_t address, Site site) {
        V value;
        __builtin_memcpy(&value, shared.read(accessor(current_, site), address, sizeof(V), era), sizeof(V));
        return value;
    }
    template <class V>
    void write_shared(uint32_t address, const V& value, Site site) {
        __builtin_memcpy(shared.write(accessor(current_, site), address, sizeof(V), era), &value, sizeof(V));
    }
    const uint8_t* read_shared(int thread, uint32_t address, int bytes, Site site) {
        return shared.read(accessor(thread, site), address, bytes, era);
    }

    void copy_async(uint32_t to, const void* from, int bytes, bool valid, Site site);
    void copy_commit();
    void copy_wait(int pending, Site site);

    void memory_barrier_init(uint32_t address, int arrivals, Site site);
    void memory_barrier_arrive(uint32_t address, int64_t expected_bytes, Site site);
    void memory_barrier_wait(uint32_t address, uint32_t parity, Site site);
    void tensor_load(uint32_t to, const TensorMap& map, int rank, const int32_t* at, uint32_t barrier, Site site);
    void proxy_fence() { shared.fence_proxy(current_, era++); }

    void issue_product(const LaneProduct& mine, GroupProduct& product, Site site);
    void group_fence(Site site);
    void group_commit(Site site);
    void group_wait(int pending, Site site);
    void check_landed(const float* d, int count, Site site) const;
    void set_registers(int count, bool grow, Site site);

    GlobalMemory global;
    SharedMemory shared;
    Counters counters;
    Era era = 1;
    int multiprocessor_shared = 228 << 10;  // bytes, as on sm_90; of a block's, the system takes kReservedShared

  private:
    struct Copy {
        uint32_t to;
        const void* from;  // null: zeros
        int bytes;
    };
    struct Thread {
        Fiber fiber;
        Clock clock;
        std::vector<std::vector<Copy>> groups;  // committed, oldest first; the last is open
        const char* waits = nullptr;            // null: can run
        Site site{};
        bool done = false;
    };
    struct Rendezvous {
        const char* name;
        int64_t immediate;
        uint32_t mask, arrived = 0;
        bool aligned;
        Site site;
        void* slots[kLanes];
    };
    struct Warp {
        uint32_t ready = 0;
        std::vector<Rendezvous> pending;
        void* slots[kLanes];
    };
    struct Barrier {
        int expected = 0, arrived = 0;
        std::vector<int> waiting;
        uint32_t lanes[kMaxWarps] = {};
        Era arrival[kMaxWarps] = {};
        Clock joined;
    };

    Accessor accessor(int thread, Site site) const { return {thread, &threads_[thread].clock, site}; }
    MemoryBarrier& memory_barrier(uint32_t address, Site site);
    void complete(MemoryBarrier& barrier);
    bool deliver();
    void finish_product(int warp, const GroupProduct& product);
    void check_registers() const;
    void check_ended() const;
    void** arrive(const char* name, int64_t immediate, uint32_t mask, bool aligned, void* slot, Site site);
    void release(uint32_t mask);
    void wake(int thread);
    void wait(const char* what, Site site);
    void leave();
    void go_on();
    void run_block();
    void shuffle_warps();
    uint64_t random();
    [[noreturn]] void deadlock();
    static void enter();

    const std::function<void()>* kernel_ = nullptr;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<int> warp_order_;
    Barrier barriers_[kBarriers];
    std::vector<MemoryBarrier> memory_barriers_;
    std::vector<TensorCopy> tensor_copies_;
    std::vector<WarpProducts> products_;      // of each warp
    std::vector<std::vector<Issue>> issues_;  // of each warpgroup
    std::vector<int> registers_;              // of a thread of each warp
    Stacks stacks_;
    Fiber scheduler_;
    int current_ = -1, alive_ = 0;
    int64_t block_ = 0, blocks_ = 0;
    uint64_t seed_ = 0, state_ = 1;
    std::string failure_;
};

}  // namespace longrope::emulator
