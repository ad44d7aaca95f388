#include "global_memory.h"

#include <algorithm>

namespace longrope::emulator {

void GlobalMemory::declare(std::vector<Range> ranges) {
    ranges_ = std::move(ranges);
    last_ = 0;
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

void GlobalMemory::check(const void* pointer, int bytes, bool write, Site site) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const auto fits = [&](const Range& r) {
        return address >= r.begin && address + bytes <= r.end && (r.writable || !write);
    };
    if (address % bytes != 0)
        throw Error(site.text() + ": " + std::to_string(bytes) + "-byte access to a global address that is " +
                    std::to_string(address % bytes) + " past a multiple of it");
    if (last_ < ranges_.size() && fits(ranges_[last_])) return;
    for (size_t i = 0; i < ranges_.size(); ++i)
        if (fits(ranges_[i])) {
            last_ = i;
            return;
        }
    std::string nearest = "no range is declared";
    uintptr_t distance = UINTPTR_MAX;
    for (const Range& r : ranges_) {
        const bool inside = address >= r.begin && address < r.end;
        const uintptr_t away = inside ? 0 : address < r.begin ? r.begin - address : address - r.end + 1;
        if (away >= distance) continue;
        distance = away;
        nearest = inside && address + bytes <= r.end
                      ? "'" + r.name + "' is read only"
                      : "byte " + std::to_string(static_cast<int64_t>(address - r.begin)) + " of '" + r.name +
                            "', which has " + std::to_string(r.end - r.begin);
    }
    throw Error(site.text() + ": " + (write ? "write" : "read") + " of " + std::to_string(bytes) +
                " bytes out of bounds: " + nearest);
}

}  // namespace longrope::emulator
