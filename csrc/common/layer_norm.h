// LayerNorm on the CPU: the arguments of layer_norm_modulate as arrays, and mean and scale of a row.
#pragma once

#include "dispatch.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// y = (x - mean) * inverse * gain + offset with gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift.
template <class A>
struct Modulation {
  std::vector<A> gain, offset;  // one row, or one for each `tokens` rows of x
  int64_t tokens, columns;
  int64_t at(int64_t row) const { return int64_t(gain.size()) > columns ? row / tokens * columns : 0; }
};

template <class A>
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
  Modulation<A> m{parameters<A>(weight, conditions, c, 1), parameters<A>(bias, conditions, c, 0), tokens, c};
  if (scale.has_value()) {
    const std::vector<A> s = parameters<A>(scale, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) m.gain[i] *= 1 + s[i], m.offset[i] *= 1 + s[i];
  }
  if (shift.has_value()) {
    const std::vector<A> s = parameters<A>(shift, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) m.offset[i] += s[i];
  }
  return m;
}

template <class A>
struct RowMoments {
  A mean, inverse;  // inverse = 1 / sqrt(variance + eps)
};

template <class T>
inline RowMoments<Acc<T>> row_moments(const T* x, int64_t n, double eps) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t whole = n / L * L;
  V total{};
  for (int64_t i = 0; i < whole; i += L) total += load(x + i);
  if (whole < n) total += load(x + whole, int(n - whole));
  A mean = sum(total) / A(n);
  V off{}, squares{};
  for (int64_t i = 0; i < whole; i += L) {
    const V d = load(x + i) - mean;
    off += d;
    squares += d * d;
  }
  A variance = sum(squares), correction = sum(off);
  for (int64_t i = whole; i < n; ++i) {
    const A d = A(to_float(x[i])) - mean;
    correction += d;
    variance += d * d;
  }
  correction /= A(n);  // what the rounding of the long sum lost
  mean += correction;
  variance -= A(n) * correction * correction;
  return {mean, A(1 / std::sqrt(double(variance) / double(n) + eps))};
}

// Calls put(i, y) or put(i, y, count) for the vectors of one normalised and modulated row.
template <class T, class Put>
inline void normalise_row(const T* x, int64_t n, RowMoments<Acc<T>> m, const Acc<T>* gain, const Acc<T>* offset,
                          const Put& put) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) put(i, (load(x + i) - m.mean) * m.inverse * load(gain + i) + load(offset + i), L);
  if (const int rest = int(n - i))
    put(i, (load(x + i, rest) - m.mean) * m.inverse * load(gain + i, rest) + load(offset + i, rest), rest);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
