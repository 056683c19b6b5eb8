// layer_norm_modulate: y = (x - mean) / sqrt(var + eps) * gain + offset over the last dimension, where
// gain = weight * (1 + scale) and offset = bias * (1 + scale) + shift are made once per batch element.
#include "common/layer_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor layer_norm_modulate(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Rows rows = rows_of(x);
  const int64_t c = rows.columns;
  Tensor out = empty_in(x, sizes_of(x), false);
  if (rows.count * c == 0) return out;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const Modulation<Acc<T>> m = modulation<T>(x, rows, scale, shift, weight, bias);
    const T* in = data<T>(rows.tensor);
    T* to = mutable_data<T>(out);
    parallel_for(0, rows.count, grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = in + r * rows.stride;
        normalise_row(row, c, row_moments(row, c, eps), &m.gain[m.at(r)], &m.offset[m.at(r)], Values<T>{to + r * c});
      }
    });
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(layer_norm_modulate)
