// linear_gelu_tanh_q8: linear_gelu_tanh of 8-bit codes and a packed int8 weight, exact in integers before GELU.
#include "common/outputs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor linear_gelu_tanh_q8(const Tensor& q, const Tensor& scale, const Tensor& zero_point, const Tensor& weight,
                           const Tensor& weight_scale, const Tensor& weight_sums, const OptionalTensor& bias,
                           int64_t out_features) {
  Sizes sizes = sizes_of(q);
  sizes.back() = out_features;
  const Tensor y = empty_strided(q, sizes, strides_in(sizes, row_major(sizes.size())), output_dtype(bias));
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(q);
  dispatch(y, [&](auto tag) {
    using T = decltype(tag);
    const auto put = outputs_of_codes<T, GeluTanh>(y, out_features, weight_scale, weight_sums, bias,
                                                   *data<float>(scale), *data<int32_t>(zero_point));
    return product<Codes8>(tokens(rows, out_features), Copied<uint8_t>{data<uint8_t>(rows.tensor)},
                           data<int8_t>(weight), uint8_t{}, put),
           0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(linear_gelu_tanh_q8)
