// Large pages for large blocks: the first touch of a fresh block costs a fault for every page, and many virtual machines
// make a fault dear.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

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

// Memory of whole large pages, from the kernel and back to it, past what malloc keeps; nullptr if there is none.
inline void* fresh_pages(size_t size) {
#if defined(__linux__)
  void* const mapped = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kLargePage - (uintptr_t(begin) & (kLargePage - 1))) & (kLargePage - 1);
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, kLargePage - before);
  return begin + before;
#else
  return std::aligned_alloc(kLargePage, size);
#endif
}
inline void return_pages(void* p, size_t size) {
#if defined(__linux__)
  munmap(p, size);
#else
  (void)size;
  std::free(p);
#endif
}

}  // namespace ldmfast
