// What becomes of a block of sums: out = sum * scale + shift (+ residual), rounded to the output's type.
#pragma once

#include "dispatch.h"
#include "product.h"

namespace LDMFAST_LEVEL_NAMESPACE {

inline void store_two(bf16* p, F a, F b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
  store(p, a);
  store(p + kLanes<float>, b);
#endif
}
template <class T>
inline void store_two(T* p, Vector<Acc<T>> a, Vector<Acc<T>> b) {
  store(p, a);
  store(p + kLanes<Acc<T>>, b);
}

template <class Sum, class T>
struct Outputs {
  typedef Acc<T> A;
  typedef Vector<A> V;
  static constexpr int L = kLanes<A>;

  T* to;
  int64_t columns;           // outputs of a pixel
  std::vector<A> shift;      // for each output, as many as the panels have; the same for scale and correction
  std::vector<A> scale;      // empty: 1
  std::vector<int32_t> correction = {};  // taken off integer sums
  const T* residual = nullptr;
  int64_t residual_pixel = 0;  // its distance from one pixel to the next

  void add(const T* numbers, int64_t pixel) {
    residual = numbers;
    residual_pixel = pixel;
  }

  V value(const Sum* c, int64_t column) const {
    V v;
    if constexpr (std::is_same_v<Sum, int32_t>) {
      int32_t whole[L];
      for (int i = 0; i < L; ++i) whole[i] = c[i] - correction[size_t(column + i)];
      for (int i = 0; i < L; ++i) v[i] = A(whole[i]);
    } else {
      v = load(c);
    }
    if (!scale.empty()) v *= load(scale.data() + column);
    return v + load(shift.data() + column);
  }

  // Rows lie far apart, so that no hardware prefetches them.
  void prefetch(int64_t pixel, int64_t column) const {
    __builtin_prefetch(to + pixel * columns + column, 1);
    if (residual != nullptr) __builtin_prefetch(residual + pixel * residual_pixel + column);
  }

  void row(const Sum* c, int64_t pixel, int64_t column) const {
    const int64_t here = std::min<int64_t>(kOutputs, columns - column);
    T* const y = to + pixel * columns + column;
    const T* const r = residual == nullptr ? nullptr : residual + pixel * residual_pixel + column;
    int j = 0;
    for (; j + 2 * L <= here; j += 2 * L) {
      V a = value(c + j, column + j), b = value(c + j + L, column + j + L);
      if (r != nullptr) {
        a += load(r + j);
        b += load(r + j + L);
      }
      store_two(y + j, a, b);
    }
    for (; j < here; j += L) {
      const int some = int(std::min<int64_t>(L, here - j));
      V a = value(c + j, column + j);
      if (r != nullptr) a += load(r + j, some);
      store(y + j, a, some);
    }
  }
};

// Numbers of a parameter, one for each output of the panels; `absent` beyond them.
template <class A>
inline std::vector<A> for_panels(const OptionalTensor& p, int64_t outputs, A absent) {
  std::vector<A> out = parameters<A>(p, 1, outputs, absent);
  out.resize(size_t(up(outputs, kOutputs)), absent);
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
