// geglu: out[r, d] = x[r, d] * g * Phi(g) with g = x[r, D + d].
#include "common/gated.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

struct Gelu {
  template <class T, class V>
  V operator()(T, V gate) const {
    return gelu_of<T>(gate);
  }
};

}  // namespace

Tensor geglu(const Tensor& x) { return gated<Gelu>(x); }

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(geglu)
