// What becomes of a block of sums: out = activation(sum * scale + shift) (+ residual), rounded to the output's type.
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

struct Identity {
  template <class T, class V>
  V operator()(T, V v) const {
    return v;
  }
};

template <class Sum, class T, class Activation = Identity>
struct Outputs {
  typedef Acc<T> A;
  typedef Vector<A> V;
  static constexpr int L = kLanes<A>;

  T* to;
  int64_t columns;           // outputs of a position
  std::vector<A> shift;      // for each output, as many as the panels have; the same for scale and correction
  std::vector<A> scale;      // empty: 1
  std::vector<int32_t> correction = {};  // taken off integer sums
  const T* residual = nullptr;
  int64_t residual_row = 0;  // its distance from one position to the next

  void add(const T* numbers, int64_t row) {
    residual = numbers;
    residual_row = row;
  }

  // The parameters of 32 outputs.
  struct Values {
    const A *shift, *scale;
    const int32_t* correction;

    V of(const Sum* c, int64_t column) const {
      V v;
      if constexpr (std::is_same_v<Sum, int32_t>) {
        int32_t whole[L];
        for (int i = 0; i < L; ++i) whole[i] = c[column + i] - correction[column + i];
        for (int i = 0; i < L; ++i) v[i] = A(whole[i]);
      } else {
        v = load(c + column);
      }
      if (scale != nullptr) v *= load(scale + column);
      return Activation{}(T{}, v + load(shift + column));
    }
  };
  Values values(int64_t column) const {
    return {shift.data() + column, scale.empty() ? nullptr : scale.data() + column,
            correction.empty() ? nullptr : correction.data() + column};
  }

  struct Panel {
    T* y;
    const T* residual;
    int64_t y_row, residual_row;
    int count;  // outputs that there are
    Values values;

    // Rows lie far apart, so that no hardware prefetches them.
    void prefetch(int64_t position) const {
      __builtin_prefetch(y + position * y_row, 1);
      if (residual != nullptr) __builtin_prefetch(residual + position * residual_row);
    }

    void row(const Sum* c, int64_t position) const {
      T* const to = y + position * y_row;
      const T* const r = residual == nullptr ? nullptr : residual + position * residual_row;
      int j = 0;
      for (; j + 2 * L <= count; j += 2 * L) {
        V a = values.of(c, j), b = values.of(c, j + L);
        if (r != nullptr) {
          a += load(r + j);
          b += load(r + j + L);
        }
        store_two(to + j, a, b);
      }
      for (; j < count; j += L) {
        const int some = std::min(L, count - j);
        V a = values.of(c, j);
        if (r != nullptr) a += load(r + j, some);
        store(to + j, a, some);
      }
    }
  };
  Panel panel(int64_t first, int64_t column) const {
    return {to + first * columns + column, residual == nullptr ? nullptr : residual + first * residual_row + column,
            columns, residual_row, int(std::min<int64_t>(kOutputs, columns - column)), values(column)};
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

  struct Panel {
    T* y;
    int64_t y_row;
    int count;
    typename Outputs<Sum, T>::Values values;

    void prefetch(int64_t position) const { __builtin_prefetch(y + position * y_row, 1); }
    void row(const Sum* c, int64_t position) const {
      T* const to = y + position * y_row;
      for (int j = 0; j < count; j += L) {
        const V out = values.of(c, j) * gelu_of<T>(values.of(c, kTile + j));
        if (count - j >= L)
          store_one(to + j, out);
        else
          store(to + j, out, count - j);
      }
    }
  };
  Panel panel(int64_t first, int64_t column) const {
    return {to + first * columns + column / 2, columns, int(std::min<int64_t>(kTile, columns - column / 2)),
            both.values(column)};
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
  if (first.has_value()) return dtype_of(*first);
  return second.has_value() ? dtype_of(*second) : aoti_torch_dtype_bfloat16();
}

// Numbers of a parameter, one for each output of the panels; `absent` beyond them.
template <class A>
inline std::vector<A> for_panels(const OptionalTensor& p, int64_t outputs, A absent) {
  std::vector<A> out = parameters<A>(p, 1, outputs, absent);
  out.resize(size_t(up(outputs, kOutputs)), absent);
  return out;
}

// What becomes of sums of codes, (code - zero) * scale, times int8 weights: numbers of y, `outputs` in a row.
template <class T, class Activation = Identity>
inline Outputs<int32_t, T, Activation> outputs_of_codes(const Tensor& y, int64_t outputs, const Tensor& weight_scale,
                                                        const Tensor& weight_sums, const OptionalTensor& bias,
                                                        float scale, int32_t zero) {
  Outputs<int32_t, T, Activation> put{mutable_data<T>(y), outputs, for_panels<Acc<T>>(bias, outputs, 0),
                                      for_panels<Acc<T>>(weight_scale, outputs, 0)};
  for (Acc<T>& s : put.scale) s *= Acc<T>(scale);
  put.correction.assign(put.scale.size(), 0);
  for (int64_t i = 0; i < outputs; ++i) put.correction[size_t(i)] = zero * data<int32_t>(weight_sums)[i];
  return put;
}

// for_panels for values and gates, half of the numbers each, in the order of GatedOutputs.
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
