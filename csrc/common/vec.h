// SIMD of our own: vectors of fp32 (F) or fp64 (D) lanes as wide as the level allows, on the compilers' vector
// extension. Everything lives in the level's namespace: the same text is compiled once per level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "isa.h"

namespace LDMFAST_LEVEL_NAMESPACE {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float F __attribute__((vector_size(kVectorBytes)));
typedef double D __attribute__((vector_size(kVectorBytes)));
typedef int32_t I __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
typedef uint16_t H __attribute__((vector_size(kVectorBytes / 2)));

// Arithmetic is in fp32, in fp64 for fp64 tensors.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class A>
struct VectorOf {
  typedef F type;
};
template <>
struct VectorOf<double> {
  typedef D type;
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

inline F splat(float x) {  // as intrinsics, so that a number from memory is broadcast by the load
#if defined(__AVX512F__)
  return (F)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (F)_mm256_set1_ps(x);
#else
  return F{} + x;
#endif
}
inline D splat(double x) { return D{} + x; }

// ---- one number ----

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  uint32_t bits = sign;
  if (exponent == 31) {
    bits |= 0x7f800000 | fraction << 13;
  } else if (exponent != 0) {
    bits |= (exponent + 112) << 23 | fraction << 13;
  } else {  // a subnormal is fraction * 2^-24, exactly
    const float magnitude = float(fraction) * 0x1p-24f;
    uint32_t small;
    std::memcpy(&small, &magnitude, 4);
    bits |= small;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline f16 half_of(float x) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: let the fp32 adder round at 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return {uint16_t(sign | (rounded - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}

// ---- loads and stores, unaligned ----

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline D load(const double* p) {
  D v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const bf16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
  H h;
  std::memcpy(&h, p, sizeof h);
  return (F)(__builtin_convertvector(h, U) << 16);
}
inline F load(const f16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16(vld1_f16((const float16_t*)p));
#else
  F v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, D v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, F v) {  // round to nearest, ties to even; NaN stays NaN
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U kept = v == v ? rounded : (bits >> 16 | 0x40);
  const H h = __builtin_convertvector(kept, H);
  std::memcpy(p, &h, sizeof h);
}
inline void store(f16* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16((float16_t*)p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = half_of(v[i]);
#endif
}

// The first n elements only; the other lanes load as zero.
template <class T>
inline Vector<Acc<T>> load(const T* p, int n) {
  T buffer[kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(buffer), p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, Vector<Acc<T>> v, int n) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, size_t(n) * sizeof(T));
}

// ---- dwords ----

// The first n of as many dwords as a vector has; the others are zero.
inline U load_dwords(const void* p, int n) {
#if defined(__AVX512F__)
  return (U)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
#else
  U v{};
  std::memcpy(&v, p, size_t(n) * 4);
  return v;
#endif
}
inline void store_dwords(void* p, U v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), (__m512i)v);
#else
  std::memcpy(p, &v, size_t(n) * 4);
#endif
}

// Lane j of row i becomes lane i of row j.
inline void transpose(U (&rows)[kLanes<float>]) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {  // exchanges the off-diagonal blocks of s x s in blocks of 2s x 2s
    const __m512i bit = _mm512_set1_epi32(s);
    const __mmask16 odd = _mm512_test_epi32_mask(lane, bit);
    const __m512i low = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - s));
    const __m512i high = _mm512_add_epi32(low, bit);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (!(i & s)) {
        const __m512i a = (__m512i)rows[i], b = (__m512i)rows[i + s];
        rows[i] = (U)_mm512_permutex2var_epi32(a, low, b);
        rows[i + s] = (U)_mm512_permutex2var_epi32(a, high, b);
      }
  }
#else
  constexpr int L = kLanes<float>;
  uint32_t cells[L][L];
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) cells[j][i] = rows[i][j];
  std::memcpy(static_cast<void*>(rows), cells, sizeof cells);
#endif
}

// ---- arithmetic ----

inline float sum(F v) {
  float total = 0;
  for (int i = 0; i < kLanes<float>; ++i) total += v[i];
  return total;
}
inline double sum(D v) {
  double total = 0;
  for (int i = 0; i < kLanes<double>; ++i) total += v[i];
  return total;
}
// The larger of two; b where either is NaN.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline float max(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes<float>; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// 2^n for whole numbers n in [-126, 127], given as integers.
inline F power_of_two(I n) { return (F)((n + 127) << 23); }

// Nearest whole number and its integer: adding 1.5 * 2^23 leaves no room for a fraction.
inline F nearest(F x, I& whole) {
  const F shifted = x + 12582912.0f;
  whole = (I)shifted - 0x4b400000;
  return shifted - 12582912.0f;
}

// e^x, relative error < 2e-7; below -87.3 it is 0, above 88.7 infinite, NaN stays.
inline F exp(F x) {
  const F low = splat(-87.33654f), high = splat(88.72283f);
  const F bounded = x < low ? low : (x > high ? high : x);
  I n;
  const F whole = nearest(bounded * 1.44269504f, n);
  const F r = (bounded - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  F p = splat(0.0013814577f) * r + 0.0083687194f;  // minimax on |r| <= ln 2 / 2
  p = p * r + 0.0416683890f;
  p = p * r + 0.1666652113f;
  p = p * r + 0.4999999404f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I half = n >> 1;  // in two steps, since 2^128 is not a number
  const F y = p * power_of_two(half) * power_of_two(n - half);
  return x < low ? F{} : (x > high ? splat(std::numeric_limits<float>::infinity()) : (x == x ? y : x));
}
inline D exp(D x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
inline V silu(V x) {
  return x / (1 + exp(-x));
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2 with small relative error in both tails: exp(-x^2/2) times a polynomial in
// t = 1 / (1 + 0.26 |x|), fitted to erfcx (relative error 6e-9 before rounding).
inline F normal_cdf(F x) {
  const F z = x < 0 ? -x : x;
  const F t = 1 / (1 + 0.26f * z);
  F p = splat(0.033927001739f) * t - 0.170523042400f;
  p = p * t + 0.290991840431f;
  p = p * t - 0.200823335129f;
  p = p * t + 0.200126890519f;
  p = p * t + 0.031203014640f;
  p = p * t + 0.109482991932f;
  p = p * t + 0.101715173730f;
  p = p * t + 0.103906635856f;
  p = p * t - 7.167596606e-6f;
  const F tail = exp(-0.5f * z * z) * p;
  return x < 0 ? tail : 1 - tail;
}
inline D normal_cdf(D x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
