// group_norm_silu: y = silu((x + shift - mean_g) / sqrt(var_g + eps) * weight + bias), channels-last or not.
#include "common/group_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

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
    T* y = mutable_data<T>(out);
    const auto put = [&](int64_t i) { return Values<T>{y + i}; };
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
