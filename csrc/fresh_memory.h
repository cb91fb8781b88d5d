// Large outputs, which an allocator takes fresh from the system at every call.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sam_fast {

constexpr int64_t kFreshBytes = int64_t{32} << 20;  // malloc of glibc asks the system anew for every larger block

// Takes the pages of [data, data + bytes), which is about to be written, in one call instead of a fault each. Only a
// hint: kernels before Linux 5.14 refuse it. Large pages (MADV_HUGEPAGE) would be several times faster still, but
// several times slower in a virtual machine that has given its free memory back to the host.
inline void take_pages(void* data, int64_t bytes) {
#if defined(__linux__)
#if !defined(MADV_POPULATE_WRITE)
  constexpr int MADV_POPULATE_WRITE = 23;
#endif
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace sam_fast
