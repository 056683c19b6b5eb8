// group_norm_silu: y = silu((x + shift - mean_g) / sqrt(var_g + eps) * weight + bias), channels-last or not.
#include "common/group_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
struct Values {  // where results go: rounded to T
  T* y;
  template <class V>
  void operator()(int64_t at, V v) const {
    store(y + at, v);
  }
  template <class V>
  void operator()(int64_t at, V v, int n) const {
    store(y + at, v, n);
  }
};

}  // namespace

Tensor group_norm_silu(const Tensor& x, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool silu_wanted) {
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
    if (silu_wanted)
      norm.apply(f, image, [](auto y) { return silu(y); }, put);
    else
      norm.apply(f, image, [](auto y) { return y; }, put);
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(group_norm_silu)
