// From a tensor's dtype to a template argument, and small parameter tensors to plain arrays.
#pragma once

#include <vector>

#include "layout.h"
#include "vec.h"

namespace LDMFAST_LEVEL_NAMESPACE {

template <class T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
inline T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with the element type of the tensor.
template <class Fn>
inline auto dispatch(const Tensor& t, const Fn& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(f16{});
    case ScalarType::Double: return f(double{});
    default: break;
  }
  LDMFAST_CHECK(false, "ldmfast kernels take float32, bfloat16, float16 and float64");
  return f(float{});
}

// Parameters of any dtype and strides as rows * columns numbers of A; `absent` everywhere if there is no tensor.
// One row given for several is repeated.
template <class A>
inline std::vector<A> parameters(const OptionalTensor& p, int64_t rows, int64_t columns, A absent) {
  std::vector<A> out(size_t(rows * columns), absent);
  if (!p.has_value() || out.empty()) return out;
  const bool matrix = p->dim() == 2;
  const int64_t step = p->stride(matrix ? 1 : 0), row_step = matrix && p->size(0) > 1 ? p->stride(0) : 0;
  dispatch(*p, [&](auto tag) {
    const auto* from = data<decltype(tag)>(*p);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[size_t(r * columns + c)] = A(to_float(from[r * row_step + c * step]));
    return 0;
  });
  return out;
}

// Work items per task, so that a task is about 32k elements: a fixed split, whatever the number of threads.
inline int64_t grain(int64_t elements_per_item) {
  return elements_per_item >= 32768 ? 1 : 32768 / (elements_per_item > 0 ? elements_per_item : 1);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
