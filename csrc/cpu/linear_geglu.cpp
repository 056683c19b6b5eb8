// linear_geglu: rows times a packed weight whose outputs are values and gates; only value * GELU(gate) is written.
#include "common/outputs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor linear_geglu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features) {
  Sizes sizes = sizes_of(x);
  sizes.back() = out_features;
  const Tensor y = empty_strided(x, sizes, strides_in(sizes, row_major(sizes.size())));
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(x);
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using P = Plain<T>;
    GatedOutputs<typename P::Sum, T> put{{}, mutable_data<T>(y), out_features};
    put.both.shift = for_gated_panels<Acc<T>>(bias, out_features);
    const int64_t outputs = 2 * up(out_features, kTile);
    return product<P>(tokens(rows, outputs), Copied<T>{data<T>(rows.tensor)}, data<T>(weight), T{}, put), 0;
  });
  return y;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(linear_geglu)
