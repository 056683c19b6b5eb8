// Enough of CUDA to run one block at a time on the host: a thread of the operating system for every CUDA thread,
// barriers for __syncthreads and for shuffles. Slow and only for the kernels' logic: it says nothing about a GPU.
#pragma once

#include <math.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
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
inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;
using std::max;
using std::min;

class Barrier {
 public:
  explicit Barrier(int count = 1) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned phase = phase_;
    if (++arrived_ == count_) return release();
    changed_.wait(lock, [&] { return phase != phase_; });
  }
  void leave() {  // a thread that returned early: the rest no longer wait for it
    std::unique_lock<std::mutex> lock(mutex_);
    --count_;
    if (count_ > 0 && arrived_ == count_) release();
  }

 private:
  void release() {
    arrived_ = 0;
    ++phase_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_, arrived_ = 0;
  unsigned phase_ = 0;
};

struct Warp {
  Barrier barrier{32};
  double value[32];
};
inline Barrier* block_barrier;
inline std::vector<Warp>* warps;

inline void __syncthreads() { block_barrier->wait(); }

template <class A>
A __shfl_down_sync(unsigned, A value, int step) {
  const unsigned lane = threadIdx.x % 32;
  Warp& warp = (*warps)[threadIdx.x / 32];
  warp.value[lane] = double(value);
  warp.barrier.wait();
  const A got = A(warp.value[lane + step < 32 ? lane + step : lane]);
  warp.barrier.wait();
  return got;
}

template <class F>
void launch(unsigned blocks, unsigned threads, F kernel) {
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    Barrier all{int(threads)};
    std::vector<Warp> each(threads / 32);
    block_barrier = &all;
    warps = &each;
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        threadIdx.x = t;
        kernel();
        all.leave();
      });
    for (std::thread& t : pool) t.join();
  }
}
