// geglu_q8: uint8 codes of geglu. The first pass looks for the range of value * gelu(gate) without computing it: gelu
// lies between -0.17 and 0 for negative gates and between 0 and the gate for positive ones, and only where that bound
// leaves the range found so far is the number itself needed.
#include "common/activation.h"
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

inline bool any_outside(F y, F lo, F hi) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)y, (__m512)lo, _CMP_LT_OQ) | _mm512_cmp_ps_mask((__m512)y, (__m512)hi, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps((__m256)y, (__m256)lo, _CMP_LT_OQ),
                                         _mm256_cmp_ps((__m256)y, (__m256)hi, _CMP_GT_OQ)));
#else
  bool any = false;
  for (int i = 0; i < kLanes<float>; ++i) any = any || y[i] < lo[i] || y[i] > hi[i];
  return any;
#endif
}
inline bool any_outside(D y, D lo, D hi) {
  bool any = false;
  for (int i = 0; i < kLanes<double>; ++i) any = any || y[i] < lo[i] || y[i] > hi[i];
  return any;
}

template <class T>
struct Search {
  using A = Acc<T>;
  using V = Vector<A>;
  V lo{}, hi{}, spoilt{};  // lo and hi are the same in every lane

  void add(V value, V gate) {
    const V steepest = gate < 0 ? splat(A(-0.17)) : gate;
    spoilt += value * 0 + gate * 0;
    if (__builtin_expect(any_outside(value * steepest, lo, hi), 0)) widen(value * gelu_of<T>(gate));
  }
  __attribute__((noinline)) void widen(V y) {
    for (int i = 0; i < kLanes<A>; ++i) {
      lo = y[i] < lo[0] ? splat(A(y[i])) : lo;
      hi = y[i] > hi[0] ? splat(A(y[i])) : hi;
    }
  }
  Range range() const {
    Range all;
    all.add(double(lo[0]));
    all.add(double(hi[0]));
    for (int i = 0; i < kLanes<A>; ++i) all.finite = all.finite && spoilt[i] == 0;
    return all;
  }
};

template <class T>
void run(const Rows& x, const Codes& codes) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t d = x.columns / 2, count = d > 0 ? x.count : 0;
  const T* in = data<T>(x.tensor);
  const Coder<A> coder = finish<A>(codes, parallel_range(count, grain(d), [&](int64_t begin, int64_t end) {
    Search<T> search;
    for (int64_t r = begin; r < end; ++r) {
      const T *value = in + r * x.stride, *gate = value + d;
      int64_t i = 0;
      for (V a, b, ga, gb; i + kPair<T> <= d; i += kPair<T>) {
        load_pair(value + i, a, b);
        load_pair(gate + i, ga, gb);
        search.add(a, ga);
        search.add(b, gb);
      }
      for (int n; i < d; i += n) {
        n = int(std::min<int64_t>(L, d - i));
        search.add(load_some(value + i, n), load_some(gate + i, n));
      }
    }
    return search.range();
  }));
  uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
  parallel_for(0, count, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t r = end; r-- > begin;)  // backwards: what was read last is still in the cache
      geglu_row(in + r * x.stride, d, Encoded<T>{q + r * d, coder});
  });
}

}  // namespace

Codes geglu_q8(const Tensor& x) {
  const Rows rows = rows_of(x);
  Sizes sizes = sizes_of(x);
  sizes.back() /= 2;
  const Codes codes = empty_codes(x, sizes, strides_in(sizes, row_major(sizes.size())));
  dispatch(x, [&](auto tag) { return run<decltype(tag)>(rows, codes), 0; });
  return codes;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(geglu_q8)
