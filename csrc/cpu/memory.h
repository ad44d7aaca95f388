// Memory as the system hands it out.
#pragma once

#include <cstdint>

namespace longrope {

// Asks for huge pages where whole ones lie in [data, data + bytes): a stream through a cache of gigabytes otherwise
// waits for the tables of its 4 KiB pages. Best before the memory is first touched. False where the system has none to
// give.
bool advise_huge_pages(void* data, int64_t bytes);

}  // namespace longrope
