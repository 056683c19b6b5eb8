// geglu_tanh: out[r, d] = x[r, d] * g / 2 * (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) with g = x[r, D + d].
#include "common/gated.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor geglu_tanh(const Tensor& x) { return gated<GeluTanh>(x); }

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(geglu_tanh)
