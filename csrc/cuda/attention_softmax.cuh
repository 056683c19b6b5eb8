// What both attention kernels do with the scores in their registers: the online softmax (Milakov and Gimelshein 2018).
//
// Registers are 16 rows of a warp: x[j] is the 16 x 8 block of columns 8 j and up, x[j][0..1] of row lane / 4, x[j][2..3]
// of row lane / 4 + 8. Four lanes share a row.
#pragma once

#include "common/attention_cuda_plan.h"
#include "common/ptx.cuh"
#include "cuda/attention_ptx.cuh"

namespace ldmfast::cuda {

struct AttentionArguments {
  AttentionSizes sizes;
  const void *q, *k, *v;
  void* out;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, token, head
  float unit;                                     // scale * log2(e), above 0
};

constexpr float kNoScore = -INFINITY;

// Of two rows: the largest score, this lane's part of the sum of weights, and 2^(old largest - new) of the last tile.
struct RowState {
  float top[2] = {kNoScore, kNoScore}, total[2] = {0, 0}, decay[2] = {1, 1};
};

__device__ __forceinline__ float across_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Scores become weights 2^(unit (score - largest)). `limit`: for each row, how many columns from column 0 of this tile on
// may be seen.
template <bool masked, int n>
__device__ __forceinline__ void weigh(float (&x)[n][4], RowState& state, float unit, const int (&limit)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = state.top[r];
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = x[j][2 * r + c];
        if (masked && 8 * j + column + c >= limit[r]) score = kNoScore;
        top = fmaxf(top, score);
      }
    top = across_row(top);
    const float base = top == kNoScore ? 0 : top * unit;  // no key seen yet: -inf less -inf would be NaN
    state.decay[r] = ptx::exp2(state.top[r] * unit - base);
    state.top[r] = top;
    float total = 0;
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float weight = ptx::exp2(fmaf(x[j][2 * r + c], unit, -base));
        x[j][2 * r + c] = weight;
        total += weight;
      }
    state.total[r] = state.total[r] * state.decay[r] + total;
  }
}

// What the rows have gathered so far, in units of the new largest score. Mostly no row of the warp has a new one.
template <int n>
__device__ __forceinline__ void rescale(float (&out)[n][4], const RowState& state) {
  if (__all_sync(0xffffffffu, state.decay[0] == 1 && state.decay[1] == 1)) return;
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[j][e] *= state.decay[e / 2];
}

// Sixteen columns of weights as the first operand of a product: rows, rows + 8, then the same of columns + 8.
template <class T>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = ptx::pack<T>(low[0], low[1]);
  a[1] = ptx::pack<T>(low[2], low[3]);
  a[2] = ptx::pack<T>(high[0], high[1]);
  a[3] = ptx::pack<T>(high[2], high[3]);
}

// 1 / sum of weights of this lane's two rows; 0 where a row saw no key.
__device__ __forceinline__ void inverse_totals(const RowState& state, float (&inverse)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = state.total[r];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[r] = total == 0 ? 0 : 1 / total;
  }
}

// First element of a row of the dense result.
template <class T>
__device__ __forceinline__ T* result_row(const AttentionArguments& a, const AttentionBlock& at, int64_t query,
                                         int depth) {
  return static_cast<T*>(a.out) + ((at.batch * a.sizes.queries + query) * a.sizes.heads + at.head) * depth;
}

}  // namespace ldmfast::cuda
