// Shared memory with a memory of who touched what, and when: it finds races by order, not by luck.
//
// Time is counted in eras; every synchronisation ends one. A thread knows for every warp up to which era that warp's
// accesses come before its own next ones (its Clock; barriers and warp_sync move it). Each 2-byte cell remembers its
// last write and, per warp, its last read. An access that conflicts with one it is not ordered after is an error,
// whatever order the scheduler happened to choose. So is a read of bytes that nothing wrote since the block began, and
// any access to bytes that an asynchronous copy is still to fill.
//
// The async proxy (bulk copies, wgmma) sees what threads wrote only after a proxy fence of the writer. What wgmma reads
// is being read from its issue to the wait of each warp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace longrope::emulator {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 16;
constexpr int kMaxMemoryBarriers = 16;
// Of warps, then of what bulk copies write on behalf of each mbarrier.
constexpr int kTimelines = kMaxWarps + kMaxMemoryBarriers;
constexpr int kCellBytes = 2;

using Era = uint32_t;

struct Clock {
    Era seen[kTimelines] = {};

    void join(const Clock& other) {
        for (int i = 0; i < kTimelines; ++i) seen[i] = seen[i] < other.seen[i] ? other.seen[i] : seen[i];
    }
};

// Who accesses: the thread, what it is ordered after, and from where.
struct Accessor {
    int thread;
    const Clock* clock;
    Site site;
};

class SharedMemory {
  public:
    // Begins a block: contents become NaN in every format, and count as never written.
    void reset(uint32_t bytes, int warps, Era now);

    const uint8_t* read(const Accessor& by, uint32_t address, int bytes, Era now);
    uint8_t* write(const Accessor& by, uint32_t address, int bytes, Era now);

    // An asynchronous copy is issued: from here to `land` nobody may touch its bytes.
    void reserve(const Accessor& by, uint32_t address, int bytes, Era now);
    uint8_t* land(const Accessor& by, uint32_t address, int bytes, Era now);

    // A bulk copy is issued by a thread, and lands on the timeline of its mbarrier.
    void reserve_bulk(const Accessor& by, uint32_t address, int bytes, Era now);
    uint8_t* land_bulk(Site site, int timeline, uint32_t address, int bytes, Era now);

    // A product of the async proxy begins to read, and has read.
    void begin_read(const Accessor& by, uint32_t address, int bytes, Era now);
    const uint8_t* end_read(int warp, uint32_t address, int bytes, Era now);

    // Writes of the thread up to `now` become visible to the async proxy.
    void fence_proxy(int thread, Era now) { fenced_[thread] = now; }
    void check_fenced(const Accessor& by, uint32_t address, int bytes) const;

    uint32_t bytes() const { return bytes_; }

  private:
    struct Write {
        Era era;
        Site site;
        int16_t thread;
        int16_t in_flight;  // thread whose copy will fill the cell, -1: none
        bool generic;       // not by the async proxy
    };
    struct Read {
        Era era;
        int16_t lane;      // -1: several
        uint16_t pending;  // products that are still to read the cell
    };

    void check_bounds(const Accessor& by, uint32_t address, int bytes) const;
    void check_written(const Accessor& by, uint32_t cell) const;
    void check_proxy(const Accessor& by, uint32_t cell, const char* what) const;
    void check_in_flight(const Accessor& by, uint32_t cell, const char* what) const;
    void check_after_write(const Accessor& by, uint32_t cell, const char* what) const;
    void check_after_reads(const Accessor& by, uint32_t cell) const;
    [[noreturn]] void race(const Accessor& by, uint32_t cell, const char* what, const std::string& other) const;

    std::vector<uint8_t> contents_;
    std::vector<Write> writes_;
    std::vector<Read> reads_;  // [cell][warp]
    std::vector<Era> fenced_;  // [thread], of its last proxy fence
    uint32_t bytes_ = 0;
    int warps_ = 0;
    Era begin_ = 0;
};

}  // namespace longrope::emulator
