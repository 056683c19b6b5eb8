// Memory of large results that goes from one operation to the next, while somebody asks for it (hold): what the kernel
// gives afresh it clears and faults in first, which costs more than many an operation. Free blocks and those in use are
// never more together than the most that was in use at once.
#pragma once

#include <mutex>
#include <vector>

#include "pages.h"

namespace ldmfast {

class Blocks {
 public:
  static Blocks& all() {
    static Blocks* const one = new Blocks;  // never destroyed: tensors may outlive everything
    return *one;
  }

  static size_t rounded(size_t bytes) { return (bytes + kLargePage - 1) & ~(kLargePage - 1); }

  // A block of at least `bytes`, its size into `size`; nullptr if nobody holds blocks, or there is no memory.
  void* take(size_t bytes, size_t& size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (holders_ == 0) return nullptr;
    size = rounded(bytes);
    auto best = free_.end();
    for (auto f = free_.begin(); f != free_.end(); ++f)
      if (f->size >= size && f->size <= 2 * size && (best == free_.end() || f->size < best->size)) best = f;
    if (best != free_.end()) {
      const Block found = *best;
      free_.erase(best);
      spare_ -= found.size;
      use(size = found.size);
      return found.memory;
    }
    use(size);
    while (!free_.empty() && live_ + spare_ > most_) drop_oldest();
    void* memory = fresh_pages(size);
    if (memory == nullptr) {
      drop_all();
      memory = fresh_pages(size);
    }
    if (memory == nullptr)
      live_ -= size;
    else
      prefer_large_pages(memory, size);
    return memory;
  }

  void give(void* memory, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_ -= size;
    spare_ += size;
    free_.push_back({memory, size});
    if (holders_ == 0) drop_all();
  }

  void hold(bool on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    holders_ += on ? 1 : -1;
    if (holders_ == 0) drop_all();
  }

 private:
  struct Block {
    void* memory;
    size_t size;
  };
  void use(size_t size) {
    live_ += size;
    if (live_ > most_) most_ = live_;
  }
  void drop_oldest() {
    return_pages(free_.front().memory, free_.front().size);
    spare_ -= free_.front().size;
    free_.erase(free_.begin());
  }
  void drop_all() {
    while (!free_.empty()) drop_oldest();
    most_ = live_;
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  size_t live_ = 0, spare_ = 0, most_ = 0;
  int holders_ = 0;
};

}  // namespace ldmfast

// For Python, through ctypes; every file that includes this has it, the linker keeps one.
extern "C" __attribute__((visibility("default"), used)) inline void ldmfast_hold_blocks(int on) {
  ldmfast::Blocks::all().hold(on != 0);
}
