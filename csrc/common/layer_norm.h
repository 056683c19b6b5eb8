// LayerNorm on the CPU: the arguments of layer_norm_modulate as arrays, and mean and scale of a row.
#pragma once

#include "pairs.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// y = (x - mean) * inverse * gain + offset with gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift.
template <class A>
struct Modulation {
  std::vector<A> gain, offset;  // one row, or one for each `tokens` rows of x; in slot order
  int64_t tokens, columns, conditions;
  size_t at(int64_t row) const { return size_t(conditions > 1 ? row / tokens * columns : 0); }
};

template <class T, class A = Acc<T>>
inline Modulation<A> modulation(const Tensor& x, const Rows& rows, const OptionalTensor& scale,
                                const OptionalTensor& shift, const OptionalTensor& weight, const OptionalTensor& bias) {
  const int64_t tokens = x.size(x.dim() - 2), c = rows.columns;
  int64_t conditions = 1;
  for (const OptionalTensor* p : {&scale, &shift}) {
    if (!p->has_value()) continue;
    const int64_t n = (*p)->size(0);
    LDMFAST_CHECK((*p)->dim() == 2 && (n == 1 || n == rows.count / tokens) && (*p)->size(1) == c,
                  "layer_norm_modulate: scale and shift have one row, or one for each batch element");
    conditions = n > conditions ? n : conditions;
  }
  Modulation<A> m{parameters<A>(weight, conditions, c, 1), parameters<A>(bias, conditions, c, 0), tokens, c,
                  conditions};
  if (scale.has_value()) {
    const std::vector<A> s = parameters<A>(scale, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) m.gain[i] *= 1 + s[i], m.offset[i] *= 1 + s[i];
  }
  if (shift.has_value()) {
    const std::vector<A> s = parameters<A>(shift, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) m.offset[i] += s[i];
  }
  m.gain = in_slot_order<T>(m.gain, conditions, c);
  m.offset = in_slot_order<T>(m.offset, conditions, c);
  return m;
}

template <class A>
struct RowMoments {
  A mean, inverse;  // inverse = 1 / sqrt(variance + eps)
};

template <class A>
struct Sums {  // of a row and of its squares, in four lanes so that no addition waits for the one before
  using V = Vector<A>;
  V total[4] = {}, squares[4] = {};
  void add(int lane, V v) {
    total[lane] += v;
    squares[lane] += v * v;
  }
  void two(int64_t, V a, V b) { add(0, a), add(1, b); }
  void four(int64_t, V a, V b, V c, V d) { add(0, a), add(1, b), add(2, c), add(3, d); }
  void some(int64_t, V v, int n) {
    for (int i = n; i < kLanes<A>; ++i) v[i] = 0;
    add(0, v);
  }
  A total_sum() const { return tree_sum<A>((total[0] + total[1]) + (total[2] + total[3])); }
  A square_sum() const { return tree_sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3])); }
};

template <class T>
inline RowMoments<Acc<T>> row_moments(const T* x, int64_t n, double eps) {
  using A = Acc<T>;
  using V = Vector<A>;
  const auto sums = [&](A centre) {
    Sums<A> all;
    const auto pair = [&](int64_t i, V& a, V& b) {
      load_pair(x + i, a, b);
      a -= centre;
      b -= centre;
    };
    for_row<T>(n, pair, [&](int64_t i, int count) { return load_some(x + i, count) - centre; }, all);
    return all;
  };
  A mean = sums(0).total_sum() / A(n);
  const Sums<A> off = sums(mean);
  const A correction = off.total_sum() / A(n);  // what the rounding of the long sum lost
  const A variance = off.square_sum() / A(n) - correction * correction;
  return {mean + correction, A(1 / std::sqrt(double(variance) + eps))};
}

// One normalised and modulated row. gain and offset are in slot order.
template <class T, class Put>
inline void normalise_row(const T* x, int64_t n, RowMoments<Acc<T>> m, const Acc<T>* gain, const Acc<T>* offset,
                          Put&& put) {
  using V = Vector<Acc<T>>;
  constexpr int L = kLanes<Acc<T>>;
  const auto y = [&](V v, int64_t i) { return (v - m.mean) * m.inverse * load(gain + i) + load(offset + i); };
  const auto pair = [&](int64_t i, V& a, V& b) {
    load_pair(x + i, a, b);
    a = y(a, i);
    b = y(b, i + L);
  };
  for_row<T>(n, pair, [&](int64_t i, int count) { const V v = load_some(x + i, count); return y(v, i); }, put);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
