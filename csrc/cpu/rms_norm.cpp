// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.
#include "common/pairs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class A>
struct Squares {  // in four lanes, so that no addition waits for the one before
  using V = Vector<A>;
  V total[4] = {};
  void two(int64_t, V a, V b) { total[0] += a * a, total[1] += b * b; }
  void four(int64_t, V a, V b, V c, V d) {
    total[0] += a * a, total[1] += b * b;
    total[2] += c * c, total[3] += d * d;
  }
  void some(int64_t, V v, int) { total[0] += v * v; }  // lanes past the end are zero
  A sum() const { return tree_sum<A>((total[0] + total[1]) + (total[2] + total[3])); }
};

template <class T>
void row(const T* x, int64_t n, double eps, const Acc<T>* weight, T* out) {
  using A = Acc<T>;
  using V = Vector<A>;
  Squares<A> squares;
  for_row<T>(n, [&](int64_t i, V& a, V& b) { load_pair(x + i, a, b); },
             [&](int64_t i, int count) { return load_some(x + i, count); }, squares);
  const A inverse = A(1 / std::sqrt(double(squares.sum() / A(n)) + eps));
  const auto y = [&](V v, int64_t i) { return v * inverse * load(weight + i); };
  for_row<T>(
      n,
      [&](int64_t i, V& a, V& b) {
        load_pair(x + i, a, b);
        a = y(a, i);
        b = y(b, i + kLanes<A>);
      },
      [&](int64_t i, int count) { return y(load_some(x + i, count), i); }, Values<T>{out});
}

}  // namespace

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  const Rows rows = rows_of(x);
  const int64_t c = rows.columns;
  Tensor out = empty_in(x, sizes_of(x), false);
  if (rows.count * c == 0) return out;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const auto gain = in_slot_order<T>(parameters<Acc<T>>(weight, 1, c, 1), 1, c);
    const T* in = data<T>(rows.tensor);
    T* to = mutable_data<T>(out);
    parallel_for(0, rows.count, grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(in + r * rows.stride, c, eps, gain.data(), to + r * c);
    });
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(rms_norm)
