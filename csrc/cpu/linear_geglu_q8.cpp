// linear_geglu_q8: linear_geglu of 8-bit codes and a packed int8 weight, exact in integers before GELU.
#include "common/outputs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor linear_geglu_q8(const Tensor& q, const Tensor& scale, const Tensor& zero_point, const Tensor& weight,
                       const Tensor& weight_scale, const Tensor& weight_sums, const OptionalTensor& bias,
                       int64_t out_features) {
  Sizes sizes = sizes_of(q);
  sizes.back() = out_features;
  const Tensor y = empty_strided(q, sizes, strides_in(sizes, row_major(sizes.size())), output_dtype(bias));
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(q);
  dispatch(y, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    GatedOutputs<int32_t, T> put{{}, mutable_data<T>(y), out_features};
    put.both.shift = for_gated_panels<A>(bias, out_features);
    put.both.scale = for_gated_panels<A>(weight_scale, out_features);
    for (A& s : put.both.scale) s *= A(*data<float>(scale));
    put.both.correction.assign(put.both.scale.size(), 0);
    for (int64_t i = 0; i < 2 * out_features; ++i) {
      const int64_t half = i / out_features, j = i % out_features;
      put.both.correction[size_t(j / kTile * kOutputs + half * kTile + j % kTile)] =
          *data<int32_t>(zero_point) * data<int32_t>(weight_sums)[i];
    }
    return product<Codes8>(tokens(rows, int64_t(put.both.scale.size())), Copied<uint8_t>{data<uint8_t>(rows.tensor)},
                           data<int8_t>(weight), uint8_t{}, put),
           0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(linear_geglu_q8)
