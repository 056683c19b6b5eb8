// group_norm_silu_fp8: the kernels of group_norm_silu.cuh, whose result is e4m3 codes of y / scale.
#include "cuda/group_norm_silu.cuh"

namespace ldmfast::cuda {

Tensor group_norm_silu_fp8(const Tensor& x, const OptionalTensor& shift, int64_t num_groups,
                           const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool silu,
                           const Tensor& scale) {
  LDMFAST_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float && scale.is_cuda(),
                "group_norm_silu_fp8: scale is one float32 on the device");
  return group_norm<true>(x, shift, num_groups, weight, bias, eps, silu, &scale);
}

}  // namespace ldmfast::cuda

LDMFAST_CUDA_KERNEL(group_norm_silu_fp8)
