// Memory of a thread that outlives a call: fresh pages would cost more than a small operation.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "pages.h"

namespace LDMFAST_LEVEL_NAMESPACE {

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class Workspace {
 public:
  // The one that all kernels share: each would keep some megabytes of its own.
  static Workspace& of_thread() {
    static thread_local Workspace one;
    return one;
  }

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(base_); }
  template <class T>
  T* take(int64_t n) {
    const size_t at = used_;
    used_ += size_t(up(n * int64_t(sizeof(T)), 64)) + 128;  // an odd number of lines: rows of equal address bits
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  // Runs `f`, which takes its pieces, once to count and once for good.
  template <class Fn>
  void lay_out(const Fn& f) {
    char* const kept = base_;
    base_ = nullptr;
    used_ = 0;
    f();
    base_ = kept;
    if (used_ > size_) {
      std::free(base_);
      const size_t page = used_ < kLargePage / 2 ? 4096 : kLargePage;
      size_ = size_t(up(int64_t(used_), int64_t(page)));
      base_ = static_cast<char*>(std::aligned_alloc(page, size_));
      if (base_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
      prefer_large_pages(base_, size_);
    }
    used_ = 0;
    f();
  }
  void shrink() {  // a large one is not worth keeping
    if (size_ <= size_t(16) << 20) return;
    std::free(base_);
    base_ = nullptr;
    size_ = 0;
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace LDMFAST_LEVEL_NAMESPACE
