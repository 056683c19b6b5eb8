// conv2d_q8: convolution of 8-bit codes with a packed int8 weight, exact in integers.
#include "common/images.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor conv2d_q8(const Tensor& q, const Tensor& scale, const Tensor& zero_point, const Tensor& weight,
                 const Tensor& weight_scale, const Tensor& weight_sums, const OptionalTensor& bias,
                 const OptionalTensor& residual, int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                 bool upsample) {
  const Tensor image = pixels_of(q), more = residual.has_value() ? pixels_of(*residual) : image;
  const Convolution c = convolution_of(q, out_channels, kernel, stride, padding, upsample);
  const Tensor y = empty_image(q, c, output_dtype(residual, bias));
  if (y.numel() == 0) return y;
  const int32_t zero = *data<int32_t>(zero_point);
  dispatch(y, [&](auto tag) {
    using T = decltype(tag);
    auto put = outputs_of_codes<T>(y, y.size(1), weight_scale, weight_sums, bias, *data<float>(scale), zero);
    if (residual.has_value()) put.add(data<T>(more), out_channels);
    return product<Codes8>(c, Copied<uint8_t>{data<uint8_t>(image)}, data<int8_t>(weight), uint8_t(zero), put), 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(conv2d_q8)
