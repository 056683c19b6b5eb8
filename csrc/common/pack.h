// Rows of tensors on their way into packed operands.
#pragma once

#include "vec.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// `n` numbers as groups of E, one group a dword: one fp32, or two bf16.
template <class E, class T>
inline U line_of(const T* from, int n) {
  if constexpr (std::is_same_v<E, float>) {
    return (U)(n >= kLanes<float> ? load(from) : load(from, n));
  } else {
#if defined(__AVX512F__)
    return (U)_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : __mmask32((1u << n) - 1), from);
#endif
  }
}
#if defined(__AVX512F__)
inline H load_halves(const bf16* from, int n) {
  return (H)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), from);
}
inline void store_halves(bf16* to, U v, int n) {
  _mm512_mask_storeu_epi16(to, n >= 32 ? ~__mmask32(0) : __mmask32((1u << n) - 1), (__m512i)v);
}
#endif
inline F square(U line, const float*) { return (F)line * (F)line; }
inline F square(U line, const bf16*) {
  const F low = (F)(line << 16), high = (F)(line & 0xffff0000u);
  return low * low + high * high;
}

// Asks for `rows` rows of n numbers, `stride` apart: heads lie far apart in memory, and no hardware prefetches that.
template <int write, class T>
inline void prefetch(const T* from, int64_t stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    const char *at = reinterpret_cast<const char*>(from + r * stride), *end = at + n * int64_t(sizeof(T));
    for (; at < end; at += 64) __builtin_prefetch(at, write, 3);
    __builtin_prefetch(end - 1, write, 3);
  }
}

constexpr int64_t kAhead = 16;  // rows between a prefetch and its use

// The largest norm of `rows` rows of n numbers; NaN or infinite if one of them is.
template <class T>
inline float longest_row(const T* from, int64_t stride, int64_t rows, int64_t n) {
  float longest = 0;
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    if (r + kAhead < rows) prefetch<0>(from + kAhead * stride, 0, 1, n);
    F squares{};
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) squares += load(from + i) * load(from + i);
    if (i < n) {
      const F x = load(from + i, int(n - i));
      squares += x * x;
    }
    const float norm = sum(squares);
    longest = norm <= longest ? longest : norm;
    if (norm != norm) break;
  }
  return std::sqrt(longest);
}

// Rows to be asked for a few lines at a time, beside other work: all at once they would fill what waits for memory.
class RowsAhead {
 public:
  RowsAhead() = default;
  template <class T>
  RowsAhead(const T* from, int64_t stride, int64_t rows, int64_t n)
      : row_(reinterpret_cast<const char*>(from)), stride_(stride * int64_t(sizeof(T))), rows_(rows),
        bytes_(n * int64_t(sizeof(T))) {}

  int64_t lines() const { return rows_ * ((bytes_ + 63) / 64); }
  void some(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 2);
      if ((at_ += 64) < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, bytes_ = 0, at_ = 0;
};

}  // namespace LDMFAST_LEVEL_NAMESPACE
