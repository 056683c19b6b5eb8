// Mean and squared deviations, joined across the threads of a warp and of a block.
#pragma once

#include <cuda_runtime.h>

namespace ldmfast::cuda {

constexpr int kWarp = 32;

template <class A>
struct Moments {
  A n = 0, mean = 0, m2 = 0;

  // One more number (Welford 1962).
  __device__ __forceinline__ void add(A x) {
    n += A(1);
    const A delta = x - mean;
    mean += delta / n;
    m2 += delta * (x - mean);
  }
  // Another set of numbers (Chan, Golub and LeVeque 1979, equation 2.1).
  __device__ __forceinline__ void join(A other_n, A other_mean, A other_m2) {
    const A both = n + other_n;
    if (both == A(0)) return;
    const A delta = other_mean - mean, share = other_n / both;
    mean += delta * share;
    m2 += other_m2 + delta * delta * (n * share);
    n = both;
  }
};

// The whole warp's moments, in lane 0.
template <class A>
__device__ __forceinline__ Moments<A> join_warp(Moments<A> m) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A n = __shfl_down_sync(0xffffffffu, m.n, step);
    const A mean = __shfl_down_sync(0xffffffffu, m.mean, step);
    const A m2 = __shfl_down_sync(0xffffffffu, m.m2, step);
    m.join(n, mean, m2);
  }
  return m;
}

// The whole block's moments, in every thread. All threads must arrive.
template <int threads, class A>
__device__ __forceinline__ Moments<A> join_block(Moments<A> m) {
  __shared__ A shared[3][threads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  m = join_warp(m);
  __syncthreads();  // a second call must not overwrite what slower threads still read
  if (lane == 0) shared[0][warp] = m.n, shared[1][warp] = m.mean, shared[2][warp] = m.m2;
  __syncthreads();
  Moments<A> whole;
#pragma unroll
  for (int w = 0; w < threads / kWarp; ++w) whole.join(shared[0][w], shared[1][w], shared[2][w]);
  return whole;
}

}  // namespace ldmfast::cuda
