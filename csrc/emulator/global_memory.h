// The ranges of memory that a kernel may touch. Every global access of a kernel is checked against them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace longrope::emulator {

struct Range {
    uintptr_t begin, end;
    bool writable;
    std::string name;
};

class GlobalMemory {
  public:
    void declare(std::vector<Range> ranges);

    // Throws unless [address, address + bytes) lies in one declared range, is aligned to `bytes`, and, for a write,
    // is writable.
    void check(const void* address, int bytes, bool write, Site site) const;

  private:
    std::vector<Range> ranges_;  // by begin
    mutable size_t last_ = 0;    // where the previous access was
};

}  // namespace longrope::emulator
