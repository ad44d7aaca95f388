// mbarriers and bulk tensor copies. A copy lands only when no thread can go on without it, in an order that the seed
// varies: whoever does not wait for it meets memory that is in flight.
#include "bulk.h"

#include <algorithm>

#include "machine.h"

namespace longrope::emulator {

const char* refusal(const TensorShape& shape) {
    if (shape.rank < 1 || shape.rank > kMaxTensorRank) return "a rank from 1 to 5";
    if (reinterpret_cast<uintptr_t>(shape.data) % 16) return "data aligned to 16 bytes";
    for (int i = 0; i < shape.rank; ++i) {
        if (shape.size[i] == 0) return "sizes above 0";
        if (shape.box[i] == 0 || shape.box[i] > 256) return "a box of 1 to 256 elements a dimension";
        if (i > 0 && (shape.stride_bytes[i - 1] % 16 || shape.stride_bytes[i - 1] >> 40))
            return "strides that are multiples of 16 bytes, below 2^40";
    }
    if (shape.box[0] * 2 % 16) return "an inner box of a multiple of 16 bytes";
    if (shape.swizzle != Swizzle::kNone && shape.box[0] * 2 != swizzle_bytes(shape.swizzle))
        return "an inner box as wide as the swizzle (narrower ones are not emulated)";
    return nullptr;
}

MemoryBarrier& Machine::memory_barrier(uint32_t address, Site site) {
    read_shared<uint64_t>(address, site);
    for (MemoryBarrier& barrier : memory_barriers_)
        if (barrier.address == address) return barrier;
    throw Error(site.text() + ": no mbarrier was initialised at shared address " + std::to_string(address));
}

void Machine::memory_barrier_init(uint32_t address, int arrivals, Site site) {
    if (arrivals < 1 || arrivals > (1 << 20) - 1)
        throw Error(site.text() + ": an mbarrier of " + std::to_string(arrivals) + " arrivals");
    write_shared<uint64_t>(address, 0, site);
    for (const MemoryBarrier& barrier : memory_barriers_)
        if (barrier.address == address) throw Error(site.text() + ": an mbarrier is initialised twice");
    if (memory_barriers_.size() == kMaxMemoryBarriers)
        throw Error(site.text() + ": more than " + std::to_string(kMaxMemoryBarriers) + " mbarriers");
    MemoryBarrier barrier;
    barrier.address = address;
    barrier.arrivals = barrier.pending = arrivals;
    memory_barriers_.push_back(barrier);
}

void Machine::memory_barrier_arrive(uint32_t address, int64_t expected_bytes, Site site) {
    MemoryBarrier& barrier = memory_barrier(address, site);
    if (barrier.pending == 0)
        throw Error(site.text() + ": one arrival too many at the mbarrier " + std::to_string(address) + " of " +
                    std::to_string(barrier.arrivals));
    barrier.joined.join(threads_[current_].clock);
    barrier.bytes += expected_bytes;
    --barrier.pending;
    complete(barrier);
}

void Machine::complete(MemoryBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.completed = barrier.joined;
    barrier.pending = barrier.arrivals;
    const uint32_t parity = barrier.phase++ & 1;
    std::vector<std::pair<int, uint32_t>> still;
    for (const auto& [thread, wanted] : barrier.waiting) {
        if (wanted != parity) {
            still.emplace_back(thread, wanted);
            continue;
        }
        threads_[thread].clock.join(barrier.completed);
        wake(thread);
    }
    barrier.waiting = std::move(still);
    shuffle_warps();
}

// As try_wait.parity in a loop: until the phase of that parity is over, which it is where the current one has the
// other.
void Machine::memory_barrier_wait(uint32_t address, uint32_t parity, Site site) {
    MemoryBarrier& barrier = memory_barrier(address, site);
    if ((barrier.phase & 1) != parity) {
        threads_[current_].clock.join(barrier.completed);
        return;
    }
    barrier.waiting.emplace_back(current_, parity);
    wait("mbarrier", site);
}

void Machine::tensor_load(uint32_t to, const TensorMap& map, int rank, const int32_t* at, uint32_t barrier, Site site) {
    TensorCopy copy{shape_of(map), to, {}, 0, current_, site};
    if (copy.shape.rank != rank)
        throw Error(site.text() + ": a copy of rank " + std::to_string(rank) + " with a map of rank " +
                    std::to_string(copy.shape.rank));
    if (to % 128 != 0)
        throw Error(site.text() + ": a bulk copy to shared address " + std::to_string(to) + " is misaligned");
    std::copy(at, at + rank, copy.at);
    copy.barrier = static_cast<int>(&memory_barrier(barrier, site) - memory_barriers_.data());
    const Accessor by = accessor(current_, site);
    shared.check_fenced(by, barrier, 8);
    for (uint32_t i = 0; i < copy.shape.box_bytes(); i += 16) shared.reserve_bulk(by, to + i, 16, era);
    tensor_copies_.push_back(copy);
}

// Lands one of the copies under way; false: there is none.
bool Machine::deliver() {
    if (tensor_copies_.empty()) return false;
    const size_t which = seed_ == 0 ? 0 : random() % tensor_copies_.size();
    const TensorCopy copy = tensor_copies_[which];
    tensor_copies_.erase(tensor_copies_.begin() + static_cast<std::ptrdiff_t>(which));
    const TensorShape& shape = copy.shape;
    const int timeline = kMaxWarps + copy.barrier;
    const uint32_t row_bytes = shape.box[0] * 2, rows = shape.box_bytes() / row_bytes;
    for (uint32_t row = 0; row < rows; ++row) {
        const uint8_t* from = static_cast<const uint8_t*>(shape.data);
        bool inside = true;
        uint32_t rest = row;
        for (int i = 1; i < shape.rank; ++i) {
            const int64_t index = int64_t{copy.at[i]} + rest % shape.box[i];
            rest /= shape.box[i];
            inside = inside && index >= 0 && index < static_cast<int64_t>(shape.size[i]);
            from += index * static_cast<int64_t>(shape.stride_bytes[i - 1]);
        }
        for (uint32_t byte = 0; byte < row_bytes; byte += 2) {
            const int64_t column = copy.at[0] + byte / 2;
            uint8_t* to = shared.land_bulk(copy.site, timeline,
                                           swizzled(copy.to + row * row_bytes + byte, shape.swizzle), 2, era);
            if (inside && column >= 0 && column < static_cast<int64_t>(shape.size[0])) {
                global.check(from + 2 * column, 2, false, copy.site);
                std::memcpy(to, from + 2 * column, 2);
            } else {
                std::memset(to, 0, 2);
            }
        }
    }
    MemoryBarrier& barrier = memory_barriers_[copy.barrier];
    barrier.joined.seen[timeline] = era++;
    barrier.bytes -= shape.box_bytes();
    complete(barrier);
    return true;
}

}  // namespace longrope::emulator
