// out[r, d] = x[r, d] * activation(x[r, D + d]), whatever the activation.
#pragma once

#include "activation.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// Activation{}(T{}, gates): of a vector of gates; T is x's element type.
template <class Activation>
inline Tensor gated(const Tensor& x) {
  const Rows rows = rows_of(x);
  const int64_t d = rows.columns / 2;
  Sizes sizes = sizes_of(x);
  sizes.back() = d;
  Tensor out = empty_in(x, sizes, false);
  if (rows.count * d == 0) return out;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(rows.tensor);
    T* to = mutable_data<T>(out);
    parallel_for(0, rows.count, grain(d), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        gated_row(in + r * rows.stride, d, [](Vector<Acc<T>> g) { return Activation{}(T{}, g); },
                  Values<T>{to + r * d});
    });
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
