// PTX under readable names. Compiled for the host (tests/cuda_on_host), each is the plain access it stands for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "e4m3.h"

namespace ldmfast::ptx {

// 16 bytes that no one writes during the launch, past the first-level cache: every block reads its part once. Not
// volatile, so that the compiler may start several before the first is used.
__device__ __forceinline__ uint4 load_once(const void* from) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#else
  return *static_cast<const uint4*>(from);
#endif
}

// 16 bytes to memory; they stay in the second-level cache, where the next operator finds them.
__device__ __forceinline__ void store(void* to, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *static_cast<uint4*>(to) = v;
#endif
}

// Two numbers as e4m3 codes, the first in the lower byte.
__device__ __forceinline__ uint16_t e4m3_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return uint16_t(e4m3(low) | e4m3(high) << 8);
#endif
}

}  // namespace ldmfast::ptx
