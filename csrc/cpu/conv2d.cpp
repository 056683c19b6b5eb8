// conv2d: convolution of channels-last images with a packed weight, plus bias and residual.
#include "common/images.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
              int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding, bool upsample) {
  const Tensor image = pixels_of(x), more = residual.has_value() ? pixels_of(*residual) : image;
  const Convolution c = convolution_of(x, out_channels, kernel, stride, padding, upsample);
  const Tensor y = empty_image(x, c, dtype_of(x));
  if (y.numel() == 0) return y;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using P = Plain<T>;
    Outputs<typename P::Sum, T> put{mutable_data<T>(y), out_channels, for_panels<Acc<T>>(bias, out_channels, 0), {}};
    if (residual.has_value()) put.add(data<T>(more), out_channels);
    return product<P>(c, Copied<T>{data<T>(image)}, data<T>(weight), T{}, put), 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(conv2d)
