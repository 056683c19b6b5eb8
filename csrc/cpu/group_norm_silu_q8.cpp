// group_norm_silu_q8: uint8 codes of group_norm_silu. The least and largest x of each channel, gathered with its
// moments, give the range of the result before any of it is computed: the map is affine, and SiLU falls to its only
// minimum and rises from there on.
#include "common/group_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr double kLowest = -0.2784645427610738, kLowestAt = -1.2784645427610738;  // minimum of SiLU, and where

double exact_silu(double y) { return y / (1 + std::exp(-y)); }

template <class A>
Range range_of(const Affine<A>& f, bool with_silu) {
  Range range;
  for (size_t i = 0; i < f.lo.size(); ++i) {
    const auto y = [&](A x) { return (double(x) - double(f.centre[i])) * double(f.gain[i]) + double(f.offset[i]); };
    const double one = y(f.lo[i]), other = y(f.hi[i]);
    range.add(with_silu ? exact_silu(one) : one);
    range.add(with_silu ? exact_silu(other) : other);
    if (with_silu && std::min(one, other) < kLowestAt && std::max(one, other) > kLowestAt) range.add(kLowest);
  }
  return range;
}

}  // namespace

Codes group_norm_silu_q8(const Tensor& x, const OptionalTensor& shift, int64_t num_groups,
                         const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool silu,
                         int64_t pad) {
  const Shape s = shape_of(x, num_groups);
  const Codes codes = empty_image_codes(x, pad);
  const Tensor dense = code_order(x);
  const bool last = x.dim() == 4 || is_channels_last(x);
  const Image image = x.dim() == 4 ? image_of(x, pad) : Image{s.n, s.c, 1, s.pixels, 0};
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const auto norm = normalisation<T>(dense, s, last, shift, weight, bias, eps);
    const bool empty = s.n * s.c * s.pixels == 0;
    const auto f = empty ? Affine<A>{} : norm.template affine<true>();
    const Coder<A> coder = finish<A>(codes, range_of(f, silu));
    uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
    const auto put = [&](int64_t i) { return Encoded<T>{q + i, coder}; };
    image.fill_border(q, coder.zero_point);
    if (empty) return 0;
    if (silu)
      norm.apply(f, image, [](auto y) { return silu_of<T>(y); }, put);
    else
      norm.apply(f, image, [](auto y) { return y; }, put);
    return 0;
  });
  return codes;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(group_norm_silu_q8)
