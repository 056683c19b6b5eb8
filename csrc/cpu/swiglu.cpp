// swiglu: out[r, d] = x[r, d] * g / (1 + exp(-g)) with g = x[r, D + d].
#include "common/gated.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

struct Silu {
  template <class T, class V>
  V operator()(T, V gate) const {
    return silu_of<T>(gate);
  }
};

}  // namespace

Tensor swiglu(const Tensor& x) { return gated<Silu>(x); }

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(swiglu)
