// gate_residual: out = x + gate * y, one row of gate for the tokens of a batch element.
#include "common/pairs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
void row(const T* x, const T* y, const Acc<T>* gate, int64_t n, T* out) {
  using V = Vector<Acc<T>>;
  constexpr int L = kLanes<Acc<T>>;
  for_row<T>(
      n,
      [&](int64_t i, V& a, V& b) {
        V ya, yb;
        load_pair(x + i, a, b);
        load_pair(y + i, ya, yb);
        a += load(gate + i) * ya;
        b += load(gate + i + L) * yb;
      },
      [&](int64_t i, int count) { return load_some(x + i, count) + load(gate + i) * load_some(y + i, count); },
      Values<T>{out});
}

}  // namespace

Tensor gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Rows xs = rows_of(x), ys = rows_of(y);
  const int64_t c = xs.columns, tokens = x.size(x.dim() - 2), conditions = gate.size(0);
  LDMFAST_CHECK(ys.count == xs.count && ys.columns == c && x.scalar_type() == y.scalar_type(),
                "gate_residual: x and y have one shape and dtype");
  Tensor out = empty_in(x, sizes_of(x), false);
  if (xs.count * c == 0) return out;
  LDMFAST_CHECK(gate.dim() == 2 && (conditions == 1 || conditions * tokens == xs.count) && gate.size(1) == c,
                "gate_residual: gate has one row, or one for each batch element");
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const auto gates = in_slot_order<T>(parameters<Acc<T>>(gate, conditions, c, 0), conditions, c);
    const T *from = data<T>(xs.tensor), *more = data<T>(ys.tensor);
    T* to = mutable_data<T>(out);
    parallel_for(0, xs.count, grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        row(from + r * xs.stride, more + r * ys.stride, &gates[size_t(conditions > 1 ? r / tokens * c : 0)], c,
            to + r * c);
    });
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(gate_residual)
