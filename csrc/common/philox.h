// Philox4x32-10 and Box-Muller in lanes of 64 bits. The same bits come from every level, from Triton's interpreter and
// from a GPU: fp64 operations are rounded one by one (see the pragmas), in the order of kernels/philox_normal.py, and
// only the result is rounded to fp32.
#pragma once

// before any other header: a product fused with a sum has other bits than the two roundings
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "dispatch.h"

namespace LDMFAST_LEVEL_NAMESPACE {

typedef uint64_t W __attribute__((vector_size(kVectorBytes)));
typedef int64_t S __attribute__((vector_size(kVectorBytes)));
typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as D
constexpr int kWords = kLanes<double>;

inline W product(W a, uint32_t b) {  // of the lower halves, exactly
#if defined(__AVX512F__)
  return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (W)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// Salmon et al. 2011, section 3.3. Words of 32 bits; the upper halves of `c` hold zeros before and after.
inline void philox(W (&c)[4], uint64_t seed) {
  uint32_t k = uint32_t(seed), m = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const W one = product(c[0], 0xD2511F53u), two = product(c[2], 0xCD9E8D57u);
    c[0] = two >> 32 ^ c[1] ^ uint64_t(k);
    c[1] = two & 0xffffffffu;
    c[2] = one >> 32 ^ c[3] ^ uint64_t(m);
    c[3] = one & 0xffffffffu;
    k += 0x9E3779B9u;
    m += 0xBB67AE85u;
  }
}

inline D number(W w) { return (D)(w | 0x4330000000000000u) - 0x1p52; }  // of a word of 32 bits
inline D rounded(D x) { return __builtin_convertvector(__builtin_convertvector(x, HalfF), D); }  // to fp32

// log x for positive normal x: e ln 2 + 2 atanh(t) with x = m 2^e, sqrt(1/2) <= m < sqrt(2), t = (m - 1) / (m + 1).
inline D logarithm(D x) {
  const W bits = (W)x - 0x3fe6a09e667f3bcdu;  // those of sqrt(1/2)
  const S e = (S)bits >> 52;
  const D m = (D)((W)x - ((W)e << 52));
  const D whole = (D)((W)(e + 1024) | 0x4330000000000000u) - (0x1p52 + 1024);
  const D t = (m - 1) / (m + 1), z = t * t;
  D p = z * (1.0 / 15) + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  p = p * z + 1.0;
  return whole * 0.6931471805599453 + 2.0 * (t * p);
}

// Sine and cosine for 0 <= x <= 7: Taylor's series around the nearest quarter of a turn.
inline void sine_cosine(D x, D& sine, D& cosine) {
  const D shifted = x * 0.6366197723675814 + 6755399441055744.0;  // 1.5 * 2^52: no room for a fraction
  const D r = x - (shifted - 6755399441055744.0) * 1.5707963267948966, z = r * r;
  D s = z * (-1.0 / 1307674368000) + 1.0 / 6227020800;
  s = s * z - 1.0 / 39916800;
  s = s * z + 1.0 / 362880;
  s = s * z - 1.0 / 5040;
  s = s * z + 1.0 / 120;
  s = s * z - 1.0 / 6;
  s = s * z + 1.0;
  s = s * r;
  D c = z * (-1.0 / 87178291200) + 1.0 / 479001600;
  c = c * z - 1.0 / 3628800;
  c = c * z + 1.0 / 40320;
  c = c * z - 1.0 / 720;
  c = c * z + 1.0 / 24;
  c = c * z - 1.0 / 2;
  c = c * z + 1.0;
  const W quarter = (W)shifted & 3;
  const D one = (quarter & 1) == 0 ? s : c, other = (quarter & 1) == 0 ? c : s;
  sine = quarter >= 2 ? -one : one;
  cosine = ((quarter + 1) & 2) != 0 ? -other : other;
}

inline D root(D x) {
#if defined(__AVX512F__)
  return (D)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (D)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  return (D)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < kWords; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Two normal numbers from two words, arguments of logarithm and sine rounded to fp32 as in cuRAND.
inline void box_muller(W first, W second, HalfF& one, HalfF& two) {
  const D u = rounded(rounded(number(first)) * 0x1p-32 + 0x1p-33);
  const double turn = double(float(6.283185307179586)) * 0x1p-32;  // of one unit
  const D v = rounded(rounded(number(second)) * turn + turn / 2);
  const D radius = root(-2.0 * logarithm(u));
  D sine, cosine;
  sine_cosine(v, sine, cosine);
  one = __builtin_convertvector(radius * sine, HalfF);
  two = __builtin_convertvector(radius * cosine, HalfF);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
