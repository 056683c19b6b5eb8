// layer_norm_modulate_q8: uint8 codes of layer_norm_modulate. The first pass keeps mean and scale of each row and the
// range of what they make of it; the second normalises again, from a cache, and rounds.
#include "common/layer_norm.h"
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Codes layer_norm_modulate_q8(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Rows rows = rows_of(x);
  const int64_t c = rows.columns;
  const Codes codes = empty_codes(x, sizes_of(x), strides_in(sizes_of(x), row_major(size_t(x.dim()))));
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const bool empty = rows.count * c == 0;
    const Modulation<A> m = empty ? Modulation<A>{} : modulation<T>(x, rows, scale, shift, weight, bias);
    std::vector<RowMoments<A>> moments(size_t(empty ? 0 : rows.count));
    const T* in = data<T>(rows.tensor);
    const auto row = [&](int64_t r, auto&& put) {
      normalise_row(in + r * rows.stride, c, moments[size_t(r)], &m.gain[m.at(r)], &m.offset[m.at(r)], put);
    };
    const Range range = parallel_range(int64_t(moments.size()), grain(c), [&](int64_t begin, int64_t end) {
      Spread<T> spread;
      for (int64_t r = begin; r < end; ++r) {
        moments[size_t(r)] = row_moments(in + r * rows.stride, c, eps);
        row(r, spread);
      }
      return spread.range();
    });
    const Coder<A> coder = finish<A>(codes, range);
    uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
    parallel_for(0, int64_t(moments.size()), grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = end; r-- > begin;)  // backwards: what was read last is still in the cache
        row(r, Encoded<T>{q + r * c, coder});
    });
    return 0;
  });
  return codes;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(layer_norm_modulate_q8)
