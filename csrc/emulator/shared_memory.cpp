#include "shared_memory.h"

#include <algorithm>

namespace longrope::emulator {

void SharedMemory::reset(uint32_t bytes, int warps, Era now) {
    const size_t cells = (bytes + kCellBytes - 1) / kCellBytes;
    if (writes_.size() < cells || warps_ != warps) {
        writes_.assign(cells, {0, {nullptr, 0}, 0, -1, true});
        reads_.assign(cells * warps, {0, 0, 0});
    }
    bytes_ = bytes;
    warps_ = warps;
    begin_ = now;
    fenced_.assign(static_cast<size_t>(warps) * kLanes, 0);
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

void SharedMemory::check_written(const Accessor& by, uint32_t cell) const {
    if (writes_[cell].era <= begin_)
        throw Error(by.site.text() + ": thread " + std::to_string(by.thread) + " reads shared address " +
                    std::to_string(cell * kCellBytes) + ", which nothing wrote");
}

void SharedMemory::check_proxy(const Accessor& by, uint32_t cell, const char* what) const {
    const Write& w = writes_[cell];
    if (w.era <= begin_ || !w.generic || fenced_[w.thread] >= w.era) return;
    throw Error(by.site.text() + ": the async proxy " + what + " shared address " + std::to_string(cell * kCellBytes) +
                " without a proxy fence after the write of thread " + std::to_string(w.thread) + " at " +
                w.site.text());
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
    const bool bulk = w.thread >= kMaxWarps * kLanes;
    race(by, cell, what,
         (bulk ? "the bulk copy" : "the write of thread " + std::to_string(w.thread)) + " at " + w.site.text());
}

void SharedMemory::check_after_reads(const Accessor& by, uint32_t cell) const {
    const Read* reads = &reads_[static_cast<size_t>(cell) * warps_];
    for (int warp = 0; warp < warps_; ++warp) {
        const Read& r = reads[warp];
        if (r.era <= begin_) continue;
        if (r.pending != 0)
            race(by, cell, "writes", "a product of warp " + std::to_string(warp) + " that is in flight");
        if (by.clock->seen[warp] >= r.era) continue;
        if (warp == by.thread / kLanes && r.lane == by.thread % kLanes) continue;
        race(by, cell, "writes", "a read by warp " + std::to_string(warp));
    }
}

const uint8_t* SharedMemory::read(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    const int warp = by.thread / kLanes;
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "reads");
        check_written(by, cell);
        check_after_write(by, cell, "reads");
        Read& r = reads_[static_cast<size_t>(cell) * warps_ + warp];
        const bool forgotten = r.era <= begin_ || by.clock->seen[warp] >= r.era;
        const int16_t lane = static_cast<int16_t>(by.thread % kLanes);
        r = {now, forgotten || r.lane == lane ? lane : int16_t{-1}, r.era <= begin_ ? uint16_t{0} : r.pending};
    }
    return contents_.data() + address;
}

uint8_t* SharedMemory::write(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "writes");
        check_after_write(by, cell, "writes");
        check_after_reads(by, cell);
        writes_[cell] = {now, by.site, static_cast<int16_t>(by.thread), -1, true};
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
        writes_[cell] = {now, by.site, static_cast<int16_t>(by.thread), -1, true};
    return contents_.data() + address;
}

void SharedMemory::reserve_bulk(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "writes");
        check_after_write(by, cell, "writes");
        check_after_reads(by, cell);
        check_proxy(by, cell, "writes");
        writes_[cell] = {now, by.site, static_cast<int16_t>(by.thread), static_cast<int16_t>(by.thread), false};
    }
}

uint8_t* SharedMemory::land_bulk(Site site, int timeline, uint32_t address, int bytes, Era now) {
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell)
        writes_[cell] = {now, site, static_cast<int16_t>(timeline * kLanes), -1, false};
    return contents_.data() + address;
}

void SharedMemory::begin_read(const Accessor& by, uint32_t address, int bytes, Era now) {
    check_bounds(by, address, bytes);
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        check_in_flight(by, cell, "reads");
        check_written(by, cell);
        check_after_write(by, cell, "reads");
        check_proxy(by, cell, "reads");
        Read& r = reads_[static_cast<size_t>(cell) * warps_ + by.thread / kLanes];
        r = {now, -1, static_cast<uint16_t>((r.era <= begin_ ? 0 : r.pending) + 1)};
    }
}

const uint8_t* SharedMemory::end_read(int warp, uint32_t address, int bytes, Era now) {
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell) {
        Read& r = reads_[static_cast<size_t>(cell) * warps_ + warp];
        r = {now, -1, static_cast<uint16_t>(r.pending - 1)};
    }
    return contents_.data() + address;
}

void SharedMemory::check_fenced(const Accessor& by, uint32_t address, int bytes) const {
    for (uint32_t cell = address / kCellBytes; cell * kCellBytes < address + bytes; ++cell)
        check_proxy(by, cell, "reads");
}

}  // namespace longrope::emulator
