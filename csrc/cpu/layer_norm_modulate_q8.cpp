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
    constexpr int L = kLanes<A>;
    const bool empty = rows.count * c == 0;
    const Modulation<A> m = empty ? Modulation<A>{} : modulation<A>(x, rows, scale, shift, weight, bias);
    std::vector<RowMoments<A>> moments(size_t(empty ? 0 : rows.count));
    const T* in = data<T>(rows.tensor);
    const auto row = [&](int64_t r, const auto& put) {
      normalise_row(in + r * rows.stride, c, moments[size_t(r)], &m.gain[size_t(m.at(r))],
                    &m.offset[size_t(m.at(r))], put);
    };
    const Range range = parallel_range(int64_t(moments.size()), grain(c), [&](int64_t begin, int64_t end) {
      Lanes<A> lanes;
      for (int64_t r = begin; r < end; ++r) {
        moments[size_t(r)] = row_moments(in + r * rows.stride, c, eps);
        row(r, [&](int64_t, Vector<A> y, int n) { n == L ? lanes.add(y) : lanes.add(y, n); });
      }
      return lanes.range();
    });
    const Coder<A> coder = finish<A>(codes, range);
    uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
    parallel_for(0, int64_t(moments.size()), grain(c), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        row(r, [&](int64_t i, Vector<A> y, int n) {
          n == L ? store_codes(q + r * c + i, coder(y)) : store_codes(q + r * c + i, coder(y), n);
        });
    });
    return 0;
  });
  return codes;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(layer_norm_modulate_q8)
