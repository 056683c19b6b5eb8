// Images as convolutions read and write them.
#pragma once

#include "outputs.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// x (N, C, H, W) dense in channels-last order; copied if it is not.
inline Tensor pixels_of(const Tensor& x) {
  if (is_dense(x, channels_last(4))) return x;
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Convolution convolution_of(const Tensor& x, int64_t outputs, int64_t kernel, int64_t stride, int64_t padding,
                                  bool upsample) {
  Convolution c;
  c.n = x.size(0);
  c.channels = x.size(1);
  c.h = x.size(2);
  c.w = x.size(3);
  c.outputs = outputs;
  c.kernel = kernel;
  c.stride = stride;
  c.padding = padding;
  c.upsample = upsample;
  c.pixel = c.channels;
  c.line = c.w * c.pixel;
  c.picture = c.h * c.line;
  return c;
}

inline Tensor empty_image(const Tensor& x, const Convolution& c, int32_t dtype) {
  const Sizes sizes{c.n, c.outputs, c.out_h(), c.out_w()};
  return empty_strided(x, sizes, strides_in(sizes, channels_last(4)), dtype);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
