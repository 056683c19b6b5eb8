// From torch's tensors to what CUDA kernels take.
#pragma once

#include "element.cuh"
#include "stable.h"

namespace ldmfast::cuda {

inline Parameter::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Parameter::kFloat;
    case ScalarType::BFloat16: return Parameter::kBFloat16;
    case ScalarType::Half: return Parameter::kHalf;
    case ScalarType::Double: return Parameter::kDouble;
    default: LDMFAST_CHECK(false, "ldmfast kernels take float32, bfloat16, float16 and float64");
  }
  return Parameter::kFloat;
}

// A vector (C,) or a matrix (N, C) of any strides, or nothing.
inline Parameter parameter(const OptionalTensor& t) {
  Parameter p;
  if (!t.has_value()) return p;
  p.data = t->const_data_ptr();
  p.type = type_of(*t);
  p.stride = t->stride(t->dim() - 1);
  p.row_stride = t->dim() == 2 ? t->stride(0) : 0;
  return p;
}

}  // namespace ldmfast::cuda
