// Step-table addressing of lincomb and the split of its elements. Plain arithmetic: tests/plan_check.cpp runs it.
#pragma once

#include <cstdint>

#include "group_norm_plan.h"

namespace ldmfast {

constexpr int kMaxInputs = 32;  // of one launch; the longest solver state has nine

// Where a coefficient is. Table and strides are a torch tensor's, so a row may be a view of a longer table.
LDMFAST_HOST_DEVICE inline int64_t table_index(int64_t row, int64_t column, int64_t row_stride, int64_t column_stride) {
  return row * row_stride + column * column_stride;
}

// Moves the coefficients that are not zero to the front, in order, with their columns. Zero in A, not in fp64: what
// rounds to zero is not read either. Returns how many.
template <class A>
LDMFAST_HOST_DEVICE inline int drop_zeros(A* coefficients, int* which, int columns) {
  int found = 0;
  for (int j = 0; j < columns; ++j) {
    const A c = coefficients[j];
    if (c == A(0)) continue;
    coefficients[found] = c;
    which[found++] = j;
  }
  return found;
}

// Elements in groups of `vector`: thread t of all threads takes groups t, t + threads, ...; the rest at the end, fewer
// than one group, goes one element each to the first threads.
struct ElementSplit {
  int64_t groups, rest_begin, rest;
};
LDMFAST_HOST_DEVICE inline ElementSplit split_elements(int64_t elements, int vector) {
  const int64_t groups = elements / vector;
  return {groups, groups * vector, elements - groups * vector};
}

}  // namespace ldmfast
