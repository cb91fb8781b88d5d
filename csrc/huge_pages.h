// Large results in huge pages, where the system gives them on request: a fresh result of 200 MB means 50,000 page
// faults of 4 KB, which take longer than making it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sam_fast {

// Asks for huge pages under the part of a buffer, not written yet, that whole ones fit into, if it is at least 32 MB:
// the C library takes those from the system anew each time.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 1 << 21;
  if (bytes < 16 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is fine
#endif
}

}  // namespace sam_fast
