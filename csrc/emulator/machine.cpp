#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace longrope::emulator {

Stacks::~Stacks() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
}

void Stacks::reserve(int threads) {
    if (threads * kBytes <= bytes_) return;
    if (memory_ != nullptr) munmap(memory_, bytes_);
    bytes_ = 0;
    void* memory = mmap(nullptr, threads * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for the stacks of a block");
    memory_ = static_cast<uint8_t*>(memory);
    bytes_ = threads * kBytes;
}

Machine& Machine::get() {
    static Machine machine;
    return machine;
}

uint64_t Machine::random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
}

// Which warp runs ahead. Seed 0 keeps the order of the warps.
void Machine::shuffle_warps() {
    if (seed_ == 0) return;
    for (size_t i = warp_order_.size(); i > 1; --i) std::swap(warp_order_[i - 1], warp_order_[random() % i]);
}

void Machine::run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
    if (threads % kLanes != 0 || threads <= 0 || threads > kLanes * kMaxWarps)
        throw Error("a block of " + std::to_string(threads) + " threads, expected a multiple of 32 up to " +
                    std::to_string(kLanes * kMaxWarps));
    if (shared_bytes + kReservedShared > multiprocessor_shared)
        throw Error(std::to_string(shared_bytes) + " bytes of shared memory, expected up to " +
                    std::to_string(multiprocessor_shared - kReservedShared));
    const int warps = threads / kLanes;
    stacks_.reserve(threads);
    kernel_ = &kernel;
    blocks_ = blocks;
    state_ = seed_ * 0x9e3779b97f4a7c15u + 1;
    warp_order_.resize(warps);
    std::iota(warp_order_.begin(), warp_order_.end(), 0);
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    if (seed_ != 0)
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    threads_.resize(threads);
    warps_.resize(warps);
    for (int64_t block : order) {
        block_ = block;
        shared.reset(static_cast<uint32_t>(shared_bytes), warps, era++);
        run_block();
        ++counters.blocks;
    }
}

void Machine::run_block() {
    const int threads = static_cast<int>(threads_.size());
    for (int t = 0; t < threads; ++t) {
        Thread& thread = threads_[t];
        thread.clock = {};
        thread.groups.assign(1, {});
        thread.waits = nullptr;
        thread.done = false;
        prepare(thread.fiber, &Machine::enter, stacks_.of(t), Stacks::kBytes);
    }
    for (Warp& warp : warps_) {
        warp.ready = ~0u;
        warp.pending.clear();
    }
    for (Barrier& barrier : barriers_) barrier = {};
    memory_barriers_.clear();
    tensor_copies_.clear();
    products_.assign(warps_.size(), {});
    for (WarpProducts& queue : products_) queue.groups.emplace_back();
    issues_.assign((warps_.size() + kGroupWarps - 1) / kGroupWarps, {});
    registers_.assign(warps_.size(), std::min(kRegisters / threads / 8 * 8, 255));
    alive_ = threads;
    failure_.clear();
    shuffle_warps();
    current_ = warp_order_[0] * kLanes;
    switch_fiber(scheduler_, threads_[current_].fiber);
    current_ = -1;
    if (failure_.empty()) check_ended();
    if (!failure_.empty()) throw Error("block " + std::to_string(block_) + ": " + failure_);
}

void Machine::enter() {
    Machine& machine = get();
    try {
        (*machine.kernel_)();
        for (const auto& group : machine.threads_[machine.current_].groups)
            if (!group.empty())
                throw Error("thread " + std::to_string(machine.current_) + " ends with a copy in flight");
    } catch (const std::exception& error) {
        machine.failure_ = error.what();
    }
    machine.leave();
}

// What a block must not leave behind.
void Machine::check_ended() const {
    check_registers();
    if (!tensor_copies_.empty())
        throw Error(tensor_copies_[0].site.text() + ": the block ends with a bulk copy in flight");
    for (size_t w = 0; w < products_.size(); ++w) {
        if (products_[w].groups.size() > 1 || !products_[w].groups[0].empty())
            throw Error("warp " + std::to_string(w) + " ends with a wgmma in flight");
        if (products_[w].issued != issues_[w / kGroupWarps].size())
            throw Error("warp " + std::to_string(w) + " issues fewer wgmma than its warpgroup");
    }
}

// The current thread is over.
void Machine::leave() {
    Thread& thread = threads_[current_];
    thread.done = true;
    warps_[current_ / kLanes].ready &= ~(1u << (current_ % kLanes));
    if (--alive_ == 0 || !failure_.empty()) switch_fiber(thread.fiber, scheduler_);
    try {
        go_on();
    } catch (const std::exception& error) {
        failure_ = error.what();
    }
    switch_fiber(thread.fiber, scheduler_);
}

// Switches to a thread that can run.
void Machine::go_on() {
    do {
        for (int w : warp_order_) {
            const uint32_t ready = warps_[w].ready;
            if (ready == 0) continue;
            const int from = current_, to = w * kLanes + __builtin_ctz(ready);
            if (to == from) return;
            ++counters.switches;
            current_ = to;
            switch_fiber(threads_[from].fiber, threads_[to].fiber);
            return;
        }
    } while (deliver());
    deadlock();
}

void Machine::deadlock() {
    std::string text = "no thread can go on:";
    int told = 0;
    const Thread* last = nullptr;
    for (size_t t = 0; t < threads_.size() && told < 6; ++t) {
        const Thread& thread = threads_[t];
        if (thread.done || (last && last->waits == thread.waits && last->site == thread.site)) continue;
        last = &thread;
        ++told;
        text += " thread " + std::to_string(t) + " waits at " + thread.site.text() + " (" + thread.waits + ")";
    }
    throw Error(text + "; " + std::to_string(threads_.size() - alive_) + " threads have ended");
}

void Machine::wait(const char* what, Site site) {
    Thread& thread = threads_[current_];
    thread.waits = what;
    thread.site = site;
    warps_[current_ / kLanes].ready &= ~(1u << (current_ % kLanes));
    go_on();
}

void Machine::wake(int thread) {
    threads_[thread].waits = nullptr;
    warps_[thread / kLanes].ready |= 1u << (thread % kLanes);
}

void** Machine::arrive(const char* name, int64_t immediate, uint32_t mask, bool aligned, void* slot, Site site) {
    Warp& warp = warps_[current_ / kLanes];
    const int lane = current_ % kLanes;
    if (!(mask >> lane & 1)) throw Error(site.text() + ": " + name + " with a mask that leaves out its own lane");
    auto found =
        std::find_if(warp.pending.begin(), warp.pending.end(), [&](const Rendezvous& r) { return r.mask >> lane & 1; });
    if (found == warp.pending.end()) {
        warp.pending.push_back({name, immediate, mask, 0, aligned, site, {}});
        found = warp.pending.end() - 1;
    }
    Rendezvous& r = *found;
    if (std::strcmp(r.name, name) != 0 || r.immediate != immediate || r.mask != mask || (aligned && !(r.site == site)))
        throw Error("warp " + std::to_string(current_ / kLanes) + " diverged: lane " + std::to_string(lane) +
                    " is at " + name + " (" + site.text() + ") while others are at " + r.name + " (" + r.site.text() +
                    ")");
    r.slots[lane] = slot;
    r.arrived |= 1u << lane;
    if (r.arrived != mask) {
        wait(name, site);
        return nullptr;
    }
    std::copy(r.slots, r.slots + kLanes, warp.slots);
    warp.pending.erase(found);
    return warp.slots;
}

void Machine::release(uint32_t mask) {
    const int first = current_ / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1 && first + lane != current_) wake(first + lane);
}

void Machine::warp_sync(Site site) {
    int unused = 0;
    collective("warp_sync", 0, ~0u, false, unused, site, [&](int**) {
        const int warp = current_ / kLanes, first = warp * kLanes;
        Clock joined;
        for (int lane = 0; lane < kLanes; ++lane) joined.join(threads_[first + lane].clock);
        joined.seen[warp] = era++;
        for (int lane = 0; lane < kLanes; ++lane) threads_[first + lane].clock = joined;
    });
}

void Machine::barrier(int id, int count, bool waits, Site site) {
    if (id < 0 || id >= kBarriers || count % kLanes != 0 || count <= 0 || count > static_cast<int>(threads_.size()))
        throw Error(site.text() + ": barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads");
    Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) barrier.expected = count;
    if (barrier.expected != count)
        throw Error(site.text() + ": barrier " + std::to_string(id) + " of " + std::to_string(count) +
                    " threads, where others expect " + std::to_string(barrier.expected));
    const int warp = current_ / kLanes;
    const uint32_t lane = 1u << (current_ % kLanes);
    if (barrier.lanes[warp] & lane)
        throw Error(site.text() + ": thread " + std::to_string(current_) + " arrives twice at barrier " +
                    std::to_string(id));
    barrier.lanes[warp] |= lane;
    // What a warp does after the last of its lanes has arrived is not ordered by this barrier.
    if (barrier.lanes[warp] == ~0u) barrier.arrival[warp] = era++;
    barrier.joined.join(threads_[current_].clock);
    if (waits) barrier.waiting.push_back(current_);
    if (++barrier.arrived < barrier.expected) {
        if (waits) wait("barrier", site);
        return;
    }
    for (int w = 0; w < kMaxWarps; ++w)
        if (barrier.lanes[w] == ~0u) barrier.joined.seen[w] = std::max(barrier.joined.seen[w], barrier.arrival[w]);
    const Barrier complete = std::exchange(barrier, {});
    for (int t : complete.waiting) {
        threads_[t].clock.join(complete.joined);
        if (t != current_) wake(t);
    }
    shuffle_warps();
}

void Machine::copy_async(uint32_t to, const void* from, int bytes, bool valid, Site site) {
    if (valid) global.check(from, bytes, false, site);
    shared.reserve(accessor(current_, site), to, bytes, era);
    threads_[current_].groups.back().push_back({to, valid ? from : nullptr, bytes});
}

void Machine::copy_commit() {
    threads_[current_].groups.emplace_back();
}

// As cp.async.wait_group: all but the `pending` youngest committed groups are complete; the open one is not committed.
void Machine::copy_wait(int pending, Site site) {
    auto& groups = threads_[current_].groups;
    std::vector<Copy> landing;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        landing.insert(landing.end(), groups.front().begin(), groups.front().end());
        groups.erase(groups.begin());
    }
    if (seed_ != 0)
        for (size_t i = landing.size(); i > 1; --i) std::swap(landing[i - 1], landing[random() % i]);
    for (const Copy& copy : landing) {
        uint8_t* to = shared.land(accessor(current_, site), copy.to, copy.bytes, era);
        if (copy.from != nullptr)
            __builtin_memcpy(to, copy.from, copy.bytes);
        else
            __builtin_memset(to, 0, copy.bytes);
    }
}

}  // namespace longrope::emulator
