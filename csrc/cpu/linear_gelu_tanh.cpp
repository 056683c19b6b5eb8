// linear_gelu_tanh: rows times a packed weight, plus bias, through GELU's tanh form.
#include "common/outputs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor linear_gelu_tanh(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  Sizes sizes = sizes_of(x);
  sizes.back() = out_features;
  const Tensor y = empty_strided(x, sizes, strides_in(sizes, row_major(sizes.size())));
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(x);
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using P = Plain<T>;
    const Outputs<typename P::Sum, T, GeluTanh> put{mutable_data<T>(y), out_features,
                                                    for_panels<Acc<T>>(bias, out_features, 0), {}};
    return product<P>(tokens(rows, out_features), Copied<T>{data<T>(rows.tensor)}, data<T>(weight), T{}, put), 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(linear_gelu_tanh)
