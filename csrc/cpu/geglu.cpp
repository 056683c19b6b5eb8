// geglu: out[r, d] = x[r, d] * g * Phi(g) with g = x[r, D + d].
#include "common/activation.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
void run(const Rows& x, T* out) {
  const int64_t d = x.columns / 2;
  const T* in = data<T>(x.tensor);
  parallel_for(0, x.count, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) geglu_row(in + r * x.stride, d, Values<T>{out + r * d});
  });
}

}  // namespace

Tensor geglu(const Tensor& x) {
  const Rows rows = rows_of(x);
  Sizes sizes = sizes_of(x);
  sizes.back() /= 2;
  Tensor out = empty_in(x, sizes, false);
  if (rows.count * rows.columns > 0)
    dispatch(x, [&](auto tag) { return run(rows, mutable_data<decltype(tag)>(out)), 0; });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(geglu)
