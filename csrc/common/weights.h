// From scores to softmax weights, 2^(unit * s - base), with a query in each lane.
#pragma once

#include "tile.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// The weights 2^(unit * s - base) of one vector of queries. NaN stays, -inf gives 0. Nothing is ever denormal on the way:
// a vector with one such number takes many times as long (docs/performance.md, "Denormal numbers").
struct Weights {
  F unit, base, low;  // below `low` a weight is 0

  Weights(float unit, F base) : unit(splat(unit)), base(base), low((base - 125.0f) / unit) {}

  // Relative error 8e-5, for weights that are rounded to bf16.
  F rough(F s) const {
#if defined(__AVX512F__)
    const F x = s * unit - base;
    const F r = (F)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // fraction; 0 of -inf
    F p = splat(0.0780245f) * r + 0.22606719f;
    p = p * r + 0.69583353f;
    p = p * r + 0.99992522f;
    const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    return (F)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)x);  // p * 2^floor(x)
#else
    return exact(s);
#endif
  }

  // Relative error 2e-7: the fraction is rounded once, as if base were near the scores.
  F exact(F s) const {
    const F bounded = max(low, s);
#if defined(__AVX512F__)
    const F whole = (F)_mm512_roundscale_ps((__m512)(bounded * unit - base), _MM_FROUND_TO_NEAREST_INT);
#else
    I n;
    const F whole = nearest(bounded * unit - base, n);
#endif
    const F r = bounded * unit - (base + whole);
    F p = splat(0.0013264667f) * r + 0.0096715363f;
    p = p * r + 0.0555073373f;
    p = p * r + 0.2402224243f;
    p = p * r + 0.6931470037f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 hidden = _mm512_cmp_ps_mask((__m512)s, (__m512)low, _CMP_LT_OQ);
    return (F)_mm512_mask_scalef_ps(_mm512_setzero_ps(), _mm512_knot(hidden), (__m512)p, (__m512)whole);
#else
    return s < low ? F{} : (bounded == bounded ? p * power_of_two(n) : bounded);
#endif
  }
};

// Rounds two rows to bf16 and pairs them, the first in the low half.
inline U pair_rounded(F a, F b) {
  const auto round = [](F x) {
    const U bits = (U)x, up = bits + 0x7fff + (bits >> 16 & 1);
    return x == x ? up : bits | 0x400000;
  };
  return (round(a) >> 16) | (round(b) & 0xffff0000u);
}

#if defined(__AMX_BF16__)
// Early enough that what is referred to stays in registers, which "memory" in the tiles' assembly would else forbid.
#define LDMFAST_INLINE __attribute__((always_inline))

// Weights of bf16 precision by integers alone: while tiles are multiplied, the second 512-bit port does no floating
// point. y = unit * s + shift leaves u = 128 (s - base + 127) - 11 in the low bits of y: an exponent and a linear
// mantissa, to which the table adds 11 + 128 (2^f - 1 - f) for the fraction f. Every CPU with AMX has VBMI.
class TileWeights {
 public:
  LDMFAST_INLINE TileWeights(const float* base, float unit)
      : slope_(_mm512_set1_ps(128 * unit)), left_(base), right_(base + 16) {}

  // Of two keys: s and s + kColumns, with kColumns queries each. `sums`: they are added up, too.
  template <bool sums>
  LDMFAST_INLINE void pair(const float* s, bf16* p) {
    half<sums>(left_, s, p);
    half<sums>(right_, s + 16, p + 32);
  }

  LDMFAST_INLINE void add_sums(float* total) const {
    _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), left_.sum));
    _mm512_storeu_ps(total + 16, _mm512_add_ps(_mm512_loadu_ps(total + 16), right_.sum));
  }

 private:
  static constexpr float kMagic = 12582912.0f;
  alignas(64) static constexpr int8_t kBend[64] = {
      8, 7, 7, 6, 6, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2,
      1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
      0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4,
      5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 11, 11, 10, 9, 9, 8};

  struct Half {  // 16 queries
    __m512 shift, sum = _mm512_setzero_ps();
    LDMFAST_INLINE explicit Half(const float* base)
        : shift(_mm512_fnmadd_ps(_mm512_set1_ps(128), _mm512_loadu_ps(base), _mm512_set1_ps(kMagic + 127 * 128 - 11))) {}
  };

  LDMFAST_INLINE __m512i linear(const float* s, __m512 shift) const {
    return (__m512i)_mm512_max_ps(_mm512_set1_ps(kMagic), _mm512_fmadd_ps(_mm512_loadu_ps(s), slope_, shift));
  }
  template <bool sums>
  LDMFAST_INLINE void half(Half& of, const float* s, bf16* p) {
    const __m512i first = linear(s, of.shift), second = linear(s + Amx::kColumns, of.shift);
    const __m512i u = _mm512_mask_shuffle_epi8(first, 0xccccccccccccccccull, second, to_high_);
    const __m512i at = _mm512_multishift_epi64_epi8(fields_, u);  // bits 1 to 6 of each word
    const __m512i w = _mm512_add_epi16(u, _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, at, bend_));
    if (sums) of.sum = _mm512_dpbf16_ps(of.sum, (__m512bh)w, (__m512bh)_mm512_set1_epi16(0x3f80));
    _mm512_storeu_si512(p, w);
  }

  __m512 slope_;
  Half left_, right_;
  __m512i bend_ = _mm512_load_si512(kBend), fields_ = _mm512_set1_epi64(0x3131212111110101);
  __m512i to_high_ = _mm512_set4_epi32(0x0d0c0000, 0x09080000, 0x05040000, 0x01000000);  // of each dword
};
#endif

}  // namespace LDMFAST_LEVEL_NAMESPACE
