// layer_norm_modulate: y = (x - mean) / sqrt(var + eps) * gain + offset over the last dimension, where
// gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift are made once per batch element.
#include "common/dispatch.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
void normalise(const T* x, T* y, int64_t n, const Acc<T>* gain, const Acc<T>* offset, double eps) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t whole = n / L * L;
  const int rest = int(n - whole);
  V total{};
  for (int64_t i = 0; i < whole; i += L) total += load(x + i);
  if (rest) total += load(x + whole, rest);
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
  const A inverse = A(1 / std::sqrt(double(variance) / double(n) + eps));
  for (int64_t i = 0; i < whole; i += L)
    store(y + i, (load(x + i) - mean) * inverse * load(gain + i) + load(offset + i));
  if (rest)
    store(y + whole, (load(x + whole, rest) - mean) * inverse * load(gain + whole, rest) + load(offset + whole, rest),
          rest);
}

template <class T>
void run(const Rows& x, T* out, int64_t tokens, int64_t conditions, const OptionalTensor& scale,
         const OptionalTensor& shift, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  using A = Acc<T>;
  const int64_t c = x.columns;
  std::vector<A> gain = parameters<A>(weight, conditions, c, 1), offset = parameters<A>(bias, conditions, c, 0);
  if (scale.has_value()) {
    const std::vector<A> s = parameters<A>(scale, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) gain[i] *= 1 + s[i], offset[i] *= 1 + s[i];
  }
  if (shift.has_value()) {
    const std::vector<A> s = parameters<A>(shift, conditions, c, 0);
    for (size_t i = 0; i < s.size(); ++i) offset[i] += s[i];
  }
  const T* in = data<T>(x.tensor);
  parallel_for(0, x.count, grain(c), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = conditions > 1 ? r / tokens * c : 0;
      normalise(in + r * x.stride, out + r * c, c, gain.data() + at, offset.data() + at, eps);
    }
  });
}

}  // namespace

Tensor layer_norm_modulate(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Rows rows = rows_of(x);
  Tensor out = empty_in(x, sizes_of(x), false);
  const int64_t tokens = x.size(x.dim() - 2);
  if (rows.count * rows.columns == 0) return out;
  int64_t conditions = 1;
  for (const OptionalTensor* p : {&scale, &shift}) {
    if (!p->has_value()) continue;
    const int64_t n = (*p)->size(0);
    LDMFAST_CHECK((*p)->dim() == 2 && (n == 1 || n == rows.count / tokens) && (*p)->size(1) == rows.columns,
                  "layer_norm_modulate: scale and shift have one row, or one for each batch element");
    conditions = n > conditions ? n : conditions;
  }
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    return run<T>(rows, mutable_data<T>(out), tokens, conditions, scale, shift, weight, bias, eps), 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(layer_norm_modulate)
