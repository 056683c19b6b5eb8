// group_norm_silu: the kernels of group_norm_silu.cuh, whose result has x's type.
#include "cuda/group_norm_silu.cuh"

namespace ldmfast::cuda {

Tensor group_norm_silu(const Tensor& x, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool silu) {
  return group_norm<false>(x, shift, num_groups, weight, bias, eps, silu, nullptr);
}

}  // namespace ldmfast::cuda

LDMFAST_CUDA_KERNEL(group_norm_silu)
