// quantize_rowwise: int8 or e4m3 codes with a scale for each row: scale = max |x| / 127 or 448, q = x / scale.
#include <tuple>

#include "common/pairs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class A>
struct Largest {  // magnitude of a row, as bits: those of NaN are above all others
  using V = Vector<A>;
  using Bits = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  typedef Bits B __attribute__((vector_size(kVectorBytes)));
  B top[2] = {};
  void add(int lane, V v) {
    const B bits = (B)v & std::numeric_limits<Bits>::max();
    top[lane] = bits > top[lane] ? bits : top[lane];
  }
  void two(int64_t, V a, V b) { add(0, a), add(1, b); }
  void four(int64_t, V a, V b, V c, V d) { add(0, a), add(1, b), add(0, c), add(1, d); }
  void some(int64_t, V v, int) { add(0, v); }  // lanes past the end are zero
  A value() const {
    Bits most = 0;
    for (const B& b : top)
      for (int i = 0; i < kLanes<A>; ++i) most = b[i] > most ? b[i] : most;
    A v;
    std::memcpy(&v, &most, sizeof v);
    return v;
  }
};

// Nearest code, ties to even, of a number that the scale has brought into the codes' range.
inline uint8_t integer_code(float v) {
  const float bounded = v < -127 ? -127.0f : (v > 127 ? 127.0f : v);
  return uint8_t(int8_t(int32_t(bounded + 12582912.0f - 12582912.0f)));
}
inline uint8_t e4m3_code(float v) {
  uint32_t bits, small;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  bits = bits > 0x43e00000 ? 0x43e00000 : bits;  // 448
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  const float shifted = magnitude + 16384.0f;  // fractions end at 2^-9, as those of numbers below 2^-6 do
  std::memcpy(&small, &shifted, 4);
  const uint32_t normal = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
  return uint8_t(sign | (bits < 0x3c800000 ? small - 0x46800000 : normal - 960));
}

template <class T>
void row(const T* x, int64_t n, bool fp8, uint8_t* q, float* scale) {
  using A = Acc<T>;
  Largest<A> largest;
  for_row<T>(n, [&](int64_t i, Vector<A>& a, Vector<A>& b) { load_pair(x + i, a, b); },
             [&](int64_t i, int count) { return load_some(x + i, count); }, largest);
  const A top = largest.value();
  float s = float(double(top) / (fp8 ? 448 : 127));
  const float least = std::numeric_limits<float>::min();
  s = top == 0 ? 1 : s < least ? least : s;
  *scale = s;
  if (!std::isfinite(s)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(q, 0, size_t(n));
    return;
  }
  const A divisor = A(s);
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L) {
    const int here = int(std::min<int64_t>(L, n - i));
    const Vector<A> v = (here == L ? load(x + i) : load_some(x + i, here)) / divisor;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) {
      if (!fp8) {
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
        std::memcpy(q + i, &bytes, size_t(here));
        continue;
      }
    }
#endif
    A values[L];
    store(values, v);
    uint8_t codes[L];
    if (fp8)
      for (int j = 0; j < L; ++j) codes[j] = e4m3_code(float(values[j]));
    else
      for (int j = 0; j < L; ++j) codes[j] = integer_code(float(values[j]));
    std::memcpy(q + i, codes, size_t(here));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_rowwise(const Tensor& x, bool fp8) {
  const Rows rows = rows_of(x);
  const int64_t c = rows.columns;
  Sizes sizes = sizes_of(x);
  const auto dense = [&](int32_t dtype) {
    return empty_strided(x, sizes, strides_in(sizes, row_major(sizes.size())), dtype);
  };
  const Tensor q = dense(fp8 ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_int8());
  sizes.pop_back();
  const Tensor scale = dense(aoti_torch_dtype_float32());
  if (rows.count == 0) return {q, scale};
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(rows.tensor);
    uint8_t* to = mutable_data<uint8_t>(q);
    float* scales = mutable_data<float>(scale);
    parallel_for(0, rows.count, grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(in + r * rows.stride, c, fp8, to + r * c, scales + r);
    });
    return 0;
  });
  return {q, scale};
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(quantize_rowwise)
