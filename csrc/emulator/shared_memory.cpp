#include "shared_memory.h"

#include <algorithm>

namespace longrope::emulator {

void SharedMemory::reset(uint32_t bytes, int warps, Era now) {
    const size_t cells = (bytes + kCellBytes - 1) / kCellBytes;
    if (writes_.size() < cells || warps_ != warps) {
        writes_.assign(cells, {0, {nullptr, 0}, 0, -1});
        reads_.assign(cells * warps, {0, 0});
    }
    bytes_ = bytes;
    warps_ = warps;
    begin_ = now;
    contents_.assign(bytes + 16, 0xff);
}

void SharedMemory::check_bounds(const Accessor& by, uint32_t address, int bytes) const {
    if (address % bytes != 0)
        throw Error(by.site.text() + ": " + std::to_string(bytes) + "-byte access to shared address " +
                    std::to_string(address) + " is misaligned");
    if (address > bytes_ || bytes > static_cast<int64_t>(bytes_) - address)
        throw Error(by.site.text() + ": shared address " + std::to_string(address) +
                    " is out of bounds, the block has " + std::to_string(bytes_) + " bytes");
}

void SharedMemory::race(const Accessor& by, uint32_t cell, const char* what, const std::string& other) const {
    throw Error(by.site.text() + ": race on shared address " + std::to_string(cell * kCellBytes) + ": thread " +
                std::to_string(by.thread) + " " + what + " it without a barrier after " + other);
}

void SharedMemory::check_in_flight(const Accessor& by, uint32_t cell, const char* what) const {
    const Write& w = writes_[cell];
    if (w.era > begin_ && w.in_flight >= 0)
        throw Error(by.site.text() + ": thread " + std::to_string(by.thread) + " " + what + " shared address " +
                    std::to_string(cell * kCellBytes) + " while the copy of thread " + std::to_string(w.in_flight) +
                    " at " + w.site.text() + " is in flight");
}

void SharedMemory::check_after_write(const Accessor& by, uint32_t cell, const char* what) const {
    const Write& w = writes_[cell];
    if (w.era <= begin_ || w.thread == by.thread || by.clock->seen[w.thread / kLanes] >= w.era) return;
    race(by, cell, what, "the write of thread " + std::to_string(w.thread) + " at " + w.site.text());
}

void SharedMemory::check_after_reads(const Accessor& by, uint32_t cell) const {
    const Read* reads = &reads_[static_cast<size_t>(cell) * warps_];
    for (int warp = 0; warp < warps_; ++warp) {
        const Read& r = reads[warp];
        if (r.era <= begin_ || by.clock->seen[warp] >= r.era) continue;
        if (warp == by.thread / kLanes && r.lane == by.thread % kLanes) continue;
        race(by, cell, "writes", "a read by warp " + std::to_string(warp));
    }
}

const uint8_t* SharedMemory::read(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    const int warp = by.thread / kLanes;
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "reads");
        if (writes_[cell].era <= begin_)
            throw Error(by.site.text() + ": thread " + std::to_string(by.thread) + " reads shared address " +
                        std::to_string(cell * kCellBytes) + ", which nothing wrote");
        check_after_write(by, cell, "reads");
        Read& r = reads_[static_cast<size_t>(cell) * warps_ + warp];
        const bool forgotten = r.era <= begin_ || by.clock->seen[warp] >= r.era;
        const int16_t lane = static_cast<int16_t>(by.thread % kLanes);
        r = {now, forgotten || r.lane == lane ? lane : int16_t{-1}};
    }
    return contents_.data() + address;
}

uint8_t* SharedMemory::write(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "writes");
        check_after_write(by, cell, "writes");
        check_after_reads(by, cell);
        writes_[cell] = {now, by.site, static_cast<int16_t>(by.thread), -1};
    }
    return contents_.data() + address;
}

void SharedMemory::reserve(const Accessor& by, uint32_t address, int bytes, Era now) {
    write(by, address, bytes, now);
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell)
        writes_[cell].in_flight = static_cast<int16_t>(by.thread);
}

uint8_t* SharedMemory::land(const Accessor& by, uint32_t address, int bytes, Era now) {
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell)
        writes_[cell] = {now, by.site, static_cast<int16_t>(by.thread), -1};
    return contents_.data() + address;
}

}  // namespace longrope::emulator
