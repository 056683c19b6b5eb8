// Large pages for large blocks: the first touch of a fresh block costs a fault for every page, and many virtual machines
// make a fault dear.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ldmfast {

constexpr size_t kLargePage = size_t(2) << 20;

// A hint for the whole large pages inside [p, p + size); pages that are in use already stay as they are.
inline void prefer_large_pages(void* p, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (uintptr_t(p) + kLargePage - 1) & ~(kLargePage - 1), end = (uintptr_t(p) + size) & ~(kLargePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)size;
#endif
}

}  // namespace ldmfast
