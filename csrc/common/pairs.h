// Rows read and written two or four vectors at a time. A pair of bf16 vectors is one load: the even elements are one
// shift away from fp32 and the odd ones one mask, in that order; what meets them lane by lane has to be in that order
// too (slot()). Of other types a pair is simply two vectors that follow each other.
#pragma once

#include <algorithm>

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

// Parameters of rows of T, `count` times c of them, each where it is met; the last vector can be read whole.
template <class T, class A>
inline std::vector<A> in_slot_order(const std::vector<A>& plain, int64_t count, int64_t c) {
  std::vector<A> out(plain.size() + kLanes<A>);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < c; ++i) out[size_t(r * c + slot<T>(i, c))] = plain[size_t(r * c + i)];
  return out;
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

// The first n < kLanes elements; the other lanes load as zero.
template <class T>
inline Vector<Acc<T>> load_some(const T* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<T, float>) return (F)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    if constexpr (std::is_same_v<T, f16>) return (F)_mm512_cvtph_ps(bits);
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
#endif
  return load(p, n);
}

// One row of n elements, made a pair of vectors at a time and put away four vectors at a time: pair(i, a, b) makes
// the vectors of elements i to i + kPair (in slot order), some(i, count) those of the last few (in their own), and
// put.four, put.two and put.some take them.
template <class T, class Pair, class Some, class Put>
inline void for_row(int64_t n, const Pair& pair, const Some& some, Put&& put) {
  constexpr int64_t two = kPair<T>;
  Vector<Acc<T>> v[4];
  int64_t i = 0;
  for (; i + 2 * two <= n; i += 2 * two) {
    pair(i, v[0], v[1]);
    pair(i + two, v[2], v[3]);
    put.four(i, v[0], v[1], v[2], v[3]);
  }
  if (i + two <= n) {
    pair(i, v[0], v[1]);
    put.two(i, v[0], v[1]);
    i += two;
  }
  for (int count; i < n; i += count) {
    count = int(std::min<int64_t>(kLanes<Acc<T>>, n - i));
    put.some(i, some(i, count), count);
  }
}

template <class T>
struct Values {  // puts a row away as numbers of T
  using V = Vector<Acc<T>>;
  T* to;
  void four(int64_t i, V a, V b, V c, V d) const {
    store_pair(to + i, a, b);
    store_pair(to + i + kPair<T>, c, d);
  }
  void two(int64_t i, V a, V b) const { store_pair(to + i, a, b); }
  void some(int64_t i, V v, int n) const { n == kLanes<Acc<T>> ? store(to + i, v) : store(to + i, v, n); }
};

template <class A>
inline A tree_sum(Vector<A> v) {
  A part[kLanes<A>];
  store(part, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
