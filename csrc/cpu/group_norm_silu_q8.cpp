// group_norm_silu_q8: uint8 codes of group_norm_silu.
#include "common/group_norm.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
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
