// quantize_rowwise: int8 rows with one scale each, symmetric.
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
inline F numbers(const T* x, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    F v{};
    for (int64_t i = 0; i < n; ++i) v[i] = float(x[i]);
    return v;
  } else {
    return n == kLanes<float> ? load(x) : load_some(x, int(n));
  }
}

template <class T>
float run(const T* x, int64_t n, int8_t* q) {
  constexpr int64_t L = kLanes<float>;
  Lanes<float> spread;
  for (int64_t i = 0; i < n; i += L) spread.add(numbers(x + i, std::min(L, n - i)));
  const Range range = spread.range();
  if (!range.finite) {
    std::fill(q, q + n, int8_t(0));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float most = float(std::max(range.hi, -range.lo));
  const float scale = most == 0 ? 1 : std::max(most / 127, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = std::min(L, n - i);
    const F v = numbers(x + i, count) / scale;
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
    std::memcpy(q + i, &bytes, size_t(count));
#else
    I whole;
    nearest(v, whole);
    for (int64_t k = 0; k < count; ++k) q[i + k] = int8_t(whole[k]);
#endif
  }
  return scale;
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_rowwise(const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const Tensor q = empty_strided(x, {rows, columns}, {std::max<int64_t>(columns, 1), 1}, aoti_torch_dtype_int8());
  const Tensor scale = empty_strided(x, {rows}, {1}, aoti_torch_dtype_float32());
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        mutable_data<float>(scale)[r] =
            run(data<T>(dense) + r * columns, columns, mutable_data<int8_t>(q) + r * columns);
    });
    return 0;
  });
  return {q, scale};
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(quantize_rowwise)
