// Tensors (batch, tokens, ...) as rows of bytes, and where a position lies in a cache of them.
#pragma once

#include "stable.h"

namespace ldmfast {

struct TokenRows {
  int64_t batch, tokens, batch_step, token_step, bytes;  // steps and the size of a row in bytes
};

inline TokenRows token_rows(const Tensor& t) {
  const int64_t size = int64_t(t.element_size());
  int64_t elements = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) elements *= t.size(d);
  return {t.size(0), t.size(1), t.stride(0) * size, t.stride(1) * size, elements * size};
}

// Whether the dimensions after the tokens' are adjacent in memory, so that a row is one piece.
inline bool has_whole_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d) > 0 ? t.size(d) : 1;
  }
  return true;
}

// The row of a position, or -1 for none. ring: positions go round.
inline int64_t row_at(int64_t position, int64_t capacity, bool ring) {
  if (position < 0 || capacity == 0) return -1;
  if (ring) return position % capacity;
  return position < capacity ? position : -1;
}

struct Positions {  // (batch or 1, tokens), int64
  const int64_t* values;
  int64_t batch_step, token_step;

  explicit Positions(const Tensor& t)
      : values(static_cast<const int64_t*>(t.const_data_ptr())),
        batch_step(t.size(0) > 1 ? t.stride(0) : 0),
        token_step(t.stride(1)) {}
  int64_t at(int64_t b, int64_t t) const { return values[b * batch_step + t * token_step]; }
};

}  // namespace ldmfast
