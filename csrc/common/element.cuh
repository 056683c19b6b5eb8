// Element types of CUDA kernels: vectors of 16 bytes, conversion to the type of the arithmetic, SiLU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace ldmfast::cuda {

// Arithmetic is in fp32, in fp64 for fp64 tensors.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, class T>
__device__ __forceinline__ A to(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return A(__bfloat162float(x));
  else if constexpr (std::is_same_v<T, __half>) return A(__half2float(x));
  else return A(x);
}

template <class T, class A>
__device__ __forceinline__ T from(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(float(x));
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(float(x));
  else return T(x);
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  if constexpr (sizeof(T) * V == 16) {
    const uint4 bits = ptx::load_once(p);
    return *reinterpret_cast<const Pack<T, V>*>(&bits);
  } else {
    return *reinterpret_cast<const Pack<T, V>*>(p);
  }
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& x) {
  if constexpr (sizeof(T) * V == 16) ptx::store(p, *reinterpret_cast<const uint4*>(&x));
  else *reinterpret_cast<Pack<T, V>*>(p) = x;
}

// y * sigmoid(y). For 16-bit results the fast exponential and division: their error is 2^-20, the rounding 2^-9.
template <class T, class A>
__device__ __forceinline__ A silu(A y) {
  if constexpr (sizeof(T) == 2) return __fdividef(y, 1.0f + __expf(-y));
  else return y / (A(1) + exp(-y));
}

// A parameter of any floating dtype and strides; absent where data is null.
struct Parameter {
  enum Type : int { kFloat, kBFloat16, kHalf, kDouble };
  const void* data = nullptr;
  Type type = kFloat;
  int64_t row_stride = 0, stride = 0;

  template <class A>
  __device__ __forceinline__ A at(int64_t i, A absent) const { return at(0, i, absent); }
  template <class A>
  __device__ __forceinline__ A at(int64_t row, int64_t i, A absent) const {
    if (data == nullptr) return absent;
    const int64_t k = row * row_stride + i * stride;
    switch (type) {
      case kBFloat16: return to<A>(static_cast<const __nv_bfloat16*>(data)[k]);
      case kHalf: return to<A>(static_cast<const __half*>(data)[k]);
      case kDouble: return A(static_cast<const double*>(data)[k]);
      default: return A(static_cast<const float*>(data)[k]);
    }
  }
};

}  // namespace ldmfast::cuda
