// Rows read and written two or four vectors at a time. A pair of bf16 vectors is one load: the even elements are one
// shift away from fp32 and the odd ones one mask, in that order; what meets them lane by lane has to be in that order
// too (slot()). Of other types a pair is simply two vectors that follow each other.
#pragma once

#include "dispatch.h"

namespace LDMFAST_LEVEL_NAMESPACE {

template <class T>
constexpr bool kInterleaved = std::is_same_v<T, bf16>;
template <class T>
constexpr int kPair = 2 * kLanes<Acc<T>>;  // elements of a pair

// Where the number that meets element i of a row of n is kept. The last n % kPair elements stay where they are.
template <class T>
inline int64_t slot(int64_t i, int64_t n) {
  constexpr int64_t pair = kPair<T>;
  if (!kInterleaved<T> || i >= n / pair * pair) return i;
  return i / pair * pair + (i & 1) * (pair / 2) + i % pair / 2;
}

template <class T>
inline void load_pair(const T* p, Vector<Acc<T>>& a, Vector<Acc<T>>& b) {
  if constexpr (kInterleaved<T>) {
    U both;
    std::memcpy(&both, p, sizeof both);
    a = (F)(both << 16);
    b = (F)(both & 0xffff0000u);
  } else {
    a = load(p);
    b = load(p + kLanes<Acc<T>>);
  }
}

inline U rounded_up_half(F v) {  // bf16 in the upper 16 bits: nearest, ties to even; NaN stays NaN
  const U bits = (U)v;
  return v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

template <class T>
inline void store_pair(T* p, Vector<Acc<T>> a, Vector<Acc<T>> b) {
  if constexpr (!kInterleaved<T>) {
    store(p, a);
    store(p + kLanes<Acc<T>>, b);
  } else {
#if defined(__AVX512BF16__)
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kZip), halves));
#else
    const U both = rounded_up_half(a) >> 16 | (rounded_up_half(b) & 0xffff0000u);
    std::memcpy(static_cast<void*>(p), &both, sizeof both);
#endif
  }
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
