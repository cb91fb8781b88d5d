// Large outputs, which an allocator takes fresh from the system at every call.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sam_fast {

// Where malloc of glibc asks the system for every block anew, and the last cache holds nothing of it afterwards.
constexpr int64_t kFreshBytes = int64_t{32} << 20;

// Asks for pages of 2 MB, before the first write to [data, data + bytes): a page fault each 4 KB costs more than what
// is written there. A hint, refused where the system has no such pages.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  if (bytes < kFreshBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace sam_fast
