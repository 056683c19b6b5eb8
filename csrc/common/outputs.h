// What becomes of a block of sums: out = sum * scale + shift (+ residual), rounded to the output's type.
#pragma once

#include "activation.h"
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
inline void store_one(bf16* p, F v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  store(p, v);
#endif
}
template <class T>
inline void store_one(T* p, Vector<Acc<T>> v) {
  store(p, v);
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

// Panels of 16 values and their 16 gates: out = value * gate * Phi(gate), each of them sum * scale + shift.
template <class Sum, class T>
struct GatedOutputs {
  typedef Vector<Acc<T>> V;
  static constexpr int L = kLanes<Acc<T>>;

  Outputs<Sum, T> both;  // its shift, scale and correction in the order of the panels
  T* to;
  int64_t columns;

  void prefetch(int64_t pixel, int64_t column) const { __builtin_prefetch(to + pixel * columns + column / 2, 1); }
  void row(const Sum* c, int64_t pixel, int64_t column) const {
    T* const y = to + pixel * columns + column / 2;
    const int64_t here = std::min<int64_t>(kTile, columns - column / 2);
    for (int j = 0; j < here; j += L) {
      const V value = both.value(c + j, column + j), gate = both.value(c + kTile + j, column + kTile + j);
      const V out = value * gelu_of<T>(gate);
      if (here - j >= L)
        store_one(y + j, out);
      else
        store(y + j, out, int(here - j));
    }
  }
};

// Tokens as an image of one pixel a line.
inline Convolution tokens(const Rows& rows, int64_t outputs) {
  Convolution c;
  c.channels = rows.columns;
  c.h = rows.count;
  c.w = 1;
  c.outputs = outputs;
  c.line = c.pixel = rows.stride;
  return c;
}

// The dtype of what 8-bit codes give: the first tensor's that is there, else bf16.
inline int32_t output_dtype(const OptionalTensor& first, const OptionalTensor& second = std::nullopt) {
  int32_t dtype = aoti_torch_dtype_bfloat16();
  for (const OptionalTensor* t : {&second, &first})
    if (t->has_value()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype((*t)->get(), &dtype));
  return dtype;
}

// Numbers of a parameter, one for each output of the panels; `absent` beyond them.
template <class A>
inline std::vector<A> for_panels(const OptionalTensor& p, int64_t outputs, A absent) {
  std::vector<A> out = parameters<A>(p, 1, outputs, absent);
  out.resize(size_t(up(outputs, kOutputs)), absent);
  return out;
}

// The same for values and gates, half of the numbers each, in the order of GatedOutputs.
template <class A>
inline std::vector<A> for_gated_panels(const OptionalTensor& p, int64_t columns) {
  const std::vector<A> plain = parameters<A>(p, 1, 2 * columns, A(0));
  std::vector<A> out(size_t(2 * up(columns, kTile)), A(0));
  for (int64_t i = 0; i < 2 * columns; ++i) {
    const int64_t half = i / columns, j = i % columns;
    out[size_t(j / kTile * kOutputs + half * kTile + j % kTile)] = plain[size_t(i)];
  }
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
