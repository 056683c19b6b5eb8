// norm_conv2d: group_norm_silu, then a convolution with a packed weight, plus bias and residual; the normalised image is
// made in the cache, a strip at a time.
#include "common/normalised.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor norm_conv2d(const Tensor& x, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& norm_weight,
                   const OptionalTensor& norm_bias, double eps, bool silu, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual, int64_t out_channels, int64_t kernel,
                   int64_t stride, int64_t padding) {
  const Tensor image = pixels_of(x), more = residual.has_value() ? pixels_of(*residual) : image;
  const Convolution c = convolution_of(x, out_channels, kernel, stride, padding, false);
  const Tensor y = empty_image(x, c, dtype_of(x));
  if (y.numel() == 0) return y;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using P = Plain<T>;
    const auto norm = normalisation<T>(image, shape_of(x, num_groups), true, shift, norm_weight, norm_bias, eps);
    const auto f = norm.template affine<false>();
    Outputs<typename P::Sum, T> put{mutable_data<T>(y), out_channels, for_panels<Acc<T>>(bias, out_channels, 0), {}};
    if (residual.has_value()) put.add(data<T>(more), out_channels);
    normalised_product<P>(c, data<T>(image), f, silu, data<T>(weight), T{}, [](T* to) { return Values<T>{to}; }, put);
    return 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(norm_conv2d)
