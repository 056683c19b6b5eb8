// SiLU and GELU as exact as the numbers they come from and go to. bf16, whose rounding is 2^-9, takes a faster "rough"
// grade with relative errors below 3e-4 (2e-3 in GELU's negative tail); fp32 and fp16 take the other.
#pragma once

#include "pairs.h"

namespace LDMFAST_LEVEL_NAMESPACE {

template <class T>
constexpr bool kRough = std::is_same_v<T, bf16>;

// 2^t: relative error 3e-6 if rough, else 2e-7. It stops at 2^-126, since a result below takes many times as long; and
// is infinite beyond the exponents of fp32, or (below AVX-512) stops at 2^-125 and 2^125; NaN stays.
template <bool rough>
inline F power_of_two(F t) {
#if defined(__AVX512DQ__)
  t = max(splat(-126.0f), t);
  const F r = (F)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t)
#else
  const F low = splat(-125.0f), high = splat(125.0f);
  const F bounded = t < low ? low : (t > high ? high : t);
  I whole;
  const F r = bounded - nearest(bounded - 0.5f, whole);
#endif
  F p;  // minimax on [0, 1]
  if constexpr (rough) {
    p = splat(1.3534168e-2f) * r + 5.2011461e-2f;
    p = p * r + 2.4144276e-1f;
    p = p * r + 6.9300383e-1f;
    p = p * r + 1.0000026f;
  } else {
    p = splat(1.8775767e-3f) * r + 8.9893401e-3f;
    p = p * r + 5.5826318e-2f;
    p = p * r + 2.4015362e-1f;
    p = p * r + 6.9315307e-1f;
    p = p * r + 9.9999993e-1f;
  }
#if defined(__AVX512DQ__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  return p * power_of_two(whole);
#endif
}

// a / b for b in [1, 2^126], or infinite.
template <bool rough>
inline F quotient(F a, F b) {
#if defined(__AVX512F__)
  const F r = (F)_mm512_rcp14_ps((__m512)b);
  if constexpr (rough) return a * r;
  const F q = a * r, rest = (F)_mm512_fnmadd_ps((__m512)q, (__m512)b, (__m512)a);  // exact only if fused
  const __mmask16 known = _mm512_cmp_ps_mask((__m512)rest, (__m512)rest, _CMP_ORD_Q);  // not where a or b is infinite
  return (F)_mm512_mask3_fmadd_ps((__m512)rest, (__m512)r, (__m512)q, known);
#elif defined(__AVX2__)
  if constexpr (rough) {
    const F r = (F)_mm256_rcp_ps((__m256)b);
    return a * (r + r * (1 - b * r));
  }
  return a / b;
#else
  return a / b;
#endif
}

// a / (1 + 2^t)
template <bool rough>
inline F logistic(F a, F t) {
  return quotient<rough>(a, 1 + power_of_two<rough>(t));
}

// T: where y comes from, or goes to.
template <class T>
inline F silu_of(F y) {
  return logistic<kRough<T>>(y, y * -1.44269504f);
}
template <class T>
inline D silu_of(D y) {
  return silu(y);
}

// y Phi(y). Rough: Phi(y) = 1 / (1 + exp(-y p(y^2))), p fitted to log(Phi / (1 - Phi)) up to |y| = 5.5.
template <class T>
inline F gelu_of(F y) {
  if constexpr (!kRough<T>) return y * normal_cdf(y);
  const F square = y * y, limit = splat(30.25f);
  const F z = square < limit ? square : limit;
  F p = splat(-1.2521054e-5f) * z + 1.3996500e-3f;
  p = p * z - 1.0907387e-1f;
  p = p * z - 2.2988113f;
  return logistic<true>(y, y * p);
}
template <class T>
inline D gelu_of(D y) {
  return y * normal_cdf(y);
}

// y / 2 (1 + tanh u) = y / (1 + exp(-2 u)) with u = sqrt(2 / pi) (y + 0.044715 y^3).
template <class T>
inline F gelu_tanh_of(F y) {
  return logistic<kRough<T>>(y, y * (y * y * -0.10294324f - 2.3022082f));  // the factors hold 2 / ln 2
}
template <class T>
inline D gelu_tanh_of(D y) {
  for (int i = 0; i < kLanes<double>; ++i)
    y[i] = 0.5 * y[i] * (1 + std::tanh(0.79788456080286535588 * (y[i] + 0.044715 * y[i] * y[i] * y[i])));
  return y;
}
struct GeluTanh {
  template <class T, class V>
  V operator()(T, V y) const {
    return gelu_tanh_of<T>(y);
  }
};

// One row: d values, then d gates; each value times the activation of its gate.
template <class T, class Activation, class Put>
inline void gated_row(const T* value, int64_t d, const Activation& activation, const Put& put) {
  using V = Vector<Acc<T>>;
  const T* gate = value + d;
  for_row<T>(
      d,
      [&](int64_t i, V& a, V& b) {
        V ga, gb;
        load_pair(value + i, a, b);
        load_pair(gate + i, ga, gb);
        a *= activation(ga);
        b *= activation(gb);
      },
      [&](int64_t i, int n) {
        const V v = load_some(value + i, n), g = load_some(gate + i, n);
        return v * activation(g);
      },
      put);
}
template <class T, class Put>
inline void geglu_row(const T* value, int64_t d, const Put& put) {
  gated_row(value, d, [](Vector<Acc<T>> g) { return gelu_of<T>(g); }, put);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
