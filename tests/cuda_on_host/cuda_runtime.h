// Enough of CUDA to run one block at a time on the host. Every CUDA thread is a coroutine that runs until it has to
// wait; who is next is drawn, so that a missing barrier shows. A block in which nobody can go on ends the process with
// a word on who waits for what. It says nothing about a GPU's speed.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace on_host {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }
  static uint32_t draw() {  // xorshift; the seed is the same in every process
    static uint32_t state = 2463534242u;
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
  }

  // Something that happens by itself; false while there is nothing to do.
  std::vector<std::function<bool()>> background;

  void run(unsigned threads, const std::function<void()>& kernel) {
    current() = this;
    kernel_ = &kernel;
    blockDim.x = threads;
    fibers_.clear();
    for (unsigned t = 0; t < threads; ++t) fibers_.push_back(std::make_unique<Fiber>());
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; ++t) order[t] = t;
    unsigned left = threads;
    for (int idle = 0; left > 0;) {
      progress_ = false;
      for (unsigned i = threads - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
      for (const unsigned t : order) {
        if (fibers_[t]->done) continue;
        resume(t);
        left -= fibers_[t]->done;
      }
      for (auto& step : background)
        if (draw() % 2 == 0 || idle > 0) progress_ |= step();
      idle = progress_ ? 0 : idle + 1;
      if (idle > 3) {
        for (unsigned t = 0; t < threads; ++t)
          if (!fibers_[t]->done) std::fprintf(stderr, "thread %u waits for %s\n", t, fibers_[t]->why);
        fail("nobody can go on");
      }
    }
    current() = nullptr;
  }
  template <class P>
  void wait_until(const char* why, P ready) {
    Fiber& mine = *fibers_[threadIdx.x];
    while (!ready()) {
      mine.why = why;
      if (_setjmp(mine.at) == 0) _longjmp(scheduler_, 1);
    }
    progress_ = true;
  }

 private:
  struct Fiber {
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack{new char[kStack]};
    const char* why = "";
    bool started = false, done = false;
  };
  static constexpr size_t kStack = size_t(64) << 10;

  static void enter() {
    Block& block = *current();
    (*block.kernel_)();
    block.fibers_[threadIdx.x]->done = true;
    block.progress_ = true;
    _longjmp(block.scheduler_, 1);
  }
  void resume(unsigned t) {
    Fiber& fiber = *fibers_[t];
    threadIdx.x = t;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  bool progress_ = false;
};

template <class P>
void wait_until(const char* why, P ready) {
  Block::current()->wait_until(why, ready);
}

struct Barrier {
  int count, arrived = 0;
  unsigned phase = 0;
  void arrive() {
    if (++arrived >= count) arrived = 0, ++phase;
  }
  void wait(const char* why) {
    const unsigned mine = phase;
    arrive();
    wait_until(why, [&] { return phase != mine; });
  }
  void leave() {  // a thread that returned: the rest no longer wait for it
    if (--count > 0 && arrived >= count) arrived = 0, ++phase;
  }
};

// What the lanes of a warp show each other. Two sides in turn: no lane can be two exchanges ahead.
struct Warp {
  Barrier barrier{32};
  uint64_t slot[2][32][8];
  unsigned turn[32] = {};
};
inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<Warp> warps;

// Shows `size` words and returns everyone's.
inline const uint64_t (*exchange(const uint64_t* words, int size))[8] {
  const unsigned lane = threadIdx.x % 32;
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned side = warp.turn[lane]++ % 2;
  for (int i = 0; i < size; ++i) warp.slot[side][lane][i] = words[i];
  warp.barrier.wait("its warp");
  return warp.slot[side];
}
template <class A>
A shuffled(A value, unsigned from) {
  uint64_t word = 0;
  std::copy_n(reinterpret_cast<const char*>(&value), sizeof(A), reinterpret_cast<char*>(&word));
  const auto all = exchange(&word, 1);
  std::copy_n(reinterpret_cast<const char*>(&all[from][0]), sizeof(A), reinterpret_cast<char*>(&value));
  return value;
}

}  // namespace on_host

inline void __syncthreads() { on_host::block_barrier->wait("__syncthreads"); }
inline void __syncwarp() { on_host::exchange(nullptr, 0); }
template <class A>
A __shfl_down_sync(unsigned, A value, int step) {
  const unsigned lane = threadIdx.x % 32;
  return on_host::shuffled(value, lane + step < 32 ? lane + step : lane);
}
template <class A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  return on_host::shuffled(value, threadIdx.x % 32 ^ unsigned(mask));
}
inline bool __all_sync(unsigned, bool value) {
  const uint64_t word = value;
  const auto all = on_host::exchange(&word, 1);
  return std::all_of(all, all + 32, [](const uint64_t* w) { return w[0] != 0; });
}

template <class F>
void launch(unsigned blocks, unsigned threads, F kernel) {
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    on_host::block_barrier = std::make_unique<on_host::Barrier>(on_host::Barrier{int(threads)});
    on_host::warps.assign((threads + 31) / 32, {});
    on_host::Block().run(threads, [&] {
      kernel();
      on_host::block_barrier->leave();
      on_host::warps[threadIdx.x / 32].barrier.leave();
    });
  }
}
