#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace longrope {

bool advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{1} << 21;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1),
                    last = (begin + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
    return first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
    (void)data, (void)bytes;
    return false;
#endif
}

}  // namespace longrope
