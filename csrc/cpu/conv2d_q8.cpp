// conv2d_q8: convolution of 8-bit codes with a packed int8 weight, exact in integers; numbers become codes while they are
// packed, so that their codes are never in memory.
#include "common/images.h"
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
struct Coded {  // a product's input (strips.h)
  const T* x;
  const Coder<Acc<T>>& coder;

  void prefetch(int64_t at) const { __builtin_prefetch(x + at); }
  template <int64_t whole>
  void chunk(uint8_t* to, int64_t, int64_t at, int64_t, int64_t count) const {
    read_row(x + at, whole > 0 ? whole : count, Encoded<T>{to, coder});
  }
};

}  // namespace

Tensor conv2d_q8(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& zero_point, const Tensor& weight,
                 const Tensor& weight_scale, const Tensor& weight_sums, const OptionalTensor& bias,
                 const OptionalTensor& residual, int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                 bool upsample) {
  const bool codes = scale.has_value();
  const Tensor image = codes ? pixels_of(x) : code_order(x), more = residual.has_value() ? pixels_of(*residual) : image;
  const Convolution c = convolution_of(x, out_channels, kernel, stride, padding, upsample);
  const Tensor y = empty_image(x, c, codes ? output_dtype(residual, bias) : dtype_of(x));
  if (y.numel() == 0) return y;
  dispatch(y, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](const auto& source, float step, int32_t zero) {
      auto put = outputs_of_codes<T>(y, y.size(1), weight_scale, weight_sums, bias, step, zero);
      if (residual.has_value()) put.add(data<T>(more), out_channels);
      product<Codes8>(c, source, data<int8_t>(weight), uint8_t(zero), put);
    };
    if (codes) {
      run(Copied<uint8_t>{data<uint8_t>(image)}, *data<float>(*scale), *data<int32_t>(*zero_point));
    } else {
      const Coder<Acc<T>> coder(range_of(data<T>(image), image.numel()));
      run(Coded<T>{data<T>(image), coder}, coder.scale, coder.zero_point);
    }
    return 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(conv2d_q8)
