// group_norm_silu: y = silu((x + shift - mean_g) / sqrt(var_g + eps) * weight + bias), channels-last or not.
#include "common/group_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
struct Values {  // where results go: rounded to T
  using V = Vector<Acc<T>>;
  T* y;
  void four(int64_t at, V a, V b, V c, V d) const {
    store_pair(y + at, a, b);
    store_pair(y + at + kPair<T>, c, d);
  }
  void two(int64_t at, V a, V b) const { store_pair(y + at, a, b); }
  void some(int64_t at, V v, int n) const { store(y + at, v, n); }
};

}  // namespace

Tensor group_norm_silu(const Tensor& x, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool silu) {
  const bool last = is_channels_last(x);
  const Tensor dense = last || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Shape s = shape_of(x, num_groups);
  Tensor out = empty_in(x, sizes_of(x), last);
  if (s.n * s.c * s.pixels == 0) return out;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const auto norm = normalisation<T>(dense, s, last, shift, weight, bias, eps);
    const auto f = norm.template affine<false>();
    const Image image{s.n, s.c, 1, s.pixels, 0};
    const Values<T> put{mutable_data<T>(out)};
    if (silu)
      norm.apply(f, image, [](auto y) { return silu_of<T>(y); }, put);
    else
      norm.apply(f, image, [](auto y) { return y; }, put);
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(group_norm_silu)
