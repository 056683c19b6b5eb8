// Memory orders of a tensor, from sizes and strides alone (the stable ABI knows no memory format).
#pragma once

#include "stable.h"

namespace ldmfast {

// Strides of a dense tensor whose dimensions, from the innermost outwards, are given by order.
inline Sizes strides_in(const Sizes& sizes, const Sizes& order) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (const int64_t d : order) {
    strides[size_t(d)] = step;
    step *= sizes[size_t(d)] > 1 ? sizes[size_t(d)] : 1;
  }
  return strides;
}

inline Sizes row_major(size_t dims) {
  Sizes order;
  for (size_t d = dims; d-- > 0;) order.push_back(int64_t(d));
  return order;
}

inline Sizes channels_last(size_t dims) {
  Sizes order{1};
  for (size_t d = dims; d-- > 2;) order.push_back(int64_t(d));
  order.push_back(0);
  return order;
}

// Whether t is dense in that order. Dimensions of size one may have any stride.
inline bool is_dense(const Tensor& t, const Sizes& order) {
  const Sizes sizes = sizes_of(t), want = strides_in(sizes, order);
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && t.stride(int64_t(d)) != want[d]) return false;
  }
  return true;
}

// The rule of ops._op.memory_format: channels-last if dense in that order and not in the ordinary one.
inline bool is_channels_last(const Tensor& t) {
  const size_t dims = size_t(t.dim());
  return (dims == 4 || dims == 5) && !t.is_contiguous() && is_dense(t, channels_last(dims));
}

inline Tensor empty_in(const Tensor& like, const Sizes& sizes, bool last) {
  return empty_strided(like, sizes, strides_in(sizes, last ? channels_last(sizes.size()) : row_major(sizes.size())));
}

// A tensor (..., C) as equal rows of C adjacent elements, one every `stride`; copied if it is not laid out so.
struct Rows {
  Tensor tensor;
  int64_t count, columns, stride;
};

inline Rows rows_of(const Tensor& t) {
  const int64_t dims = t.dim(), columns = t.size(dims - 1);
  int64_t count = 1, stride = columns;
  bool regular = columns <= 1 || t.stride(dims - 1) == 1, first = true;
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = t.size(d);
    if (size != 1) {
      if (first) {
        stride = t.stride(d);
        first = false;
      } else if (t.stride(d) != stride * count) {
        regular = false;
      }
    }
    count *= size;
  }
  if (regular || count == 0) return {t, count, columns, stride};
  return {torch::stable::contiguous(t), count, columns, columns};
}

}  // namespace ldmfast
