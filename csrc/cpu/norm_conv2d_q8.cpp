// norm_conv2d_q8: the codes of group_norm_silu_q8, made in the cache a strip at a time, times a packed int8 weight.
#include "common/normalised.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor norm_conv2d_q8(const Tensor& x, const OptionalTensor& shift, int64_t num_groups,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps, bool silu,
                      const Tensor& weight, const Tensor& weight_scale, const Tensor& weight_sums,
                      const OptionalTensor& bias, const OptionalTensor& residual, int64_t out_channels, int64_t kernel,
                      int64_t stride, int64_t padding) {
  const Tensor image = pixels_of(x), more = residual.has_value() ? pixels_of(*residual) : image;
  const Convolution c = convolution_of(x, out_channels, kernel, stride, padding, false);
  const Tensor y = empty_image(x, c, dtype_of(x));
  if (y.numel() == 0) return y;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const auto norm = normalisation<T>(image, shape_of(x, num_groups), true, shift, norm_weight, norm_bias, eps);
    const auto f = norm.template affine<true>();
    const Coder<Acc<T>> coder(range_of(f, silu));
    auto put = outputs_of_codes<T>(y, y.size(1), weight_scale, weight_sums, bias, coder.scale, coder.zero_point);
    if (residual.has_value()) put.add(data<T>(more), out_channels);
    normalised_product<Codes8>(c, data<T>(image), f, silu, data<int8_t>(weight), uint8_t(coder.zero_point),
                               [&](uint8_t* to) { return Encoded<T>{to, coder}; }, put);
    return 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(norm_conv2d_q8)
