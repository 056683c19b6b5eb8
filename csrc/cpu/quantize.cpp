// quantize: uint8 codes of a tensor, with a border for the convolution that reads them.
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class T>
void run(const T* x, int64_t n, const Image& image, const Codes& codes) {
  const int64_t parts = (n + kPart - 1) / kPart;
  const auto size = [&](int64_t i) { return std::min(kPart, n - i * kPart); };
  const Coder<Acc<T>> coder = finish<Acc<T>>(codes, range_of(x, n));
  uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
  image.fill_border(q, coder.zero_point);
  if (image.pad == 0) {
    parallel_for(0, parts, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;)  // backwards: what was read last is still in the cache
        read_row(x + i * kPart, size(i), Encoded<T>{q + i * kPart, coder});
    });
  } else if (n > 0) {  // lines of no pixels have no place, and image.at divides by their width
    const int64_t columns = image.w * image.c;
    parallel_for(0, image.n * image.h, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;)
        read_row(x + i * columns, columns, Encoded<T>{q + image.at(i / image.h, i % image.h * image.w), coder});
    });
  }
}

}  // namespace

Codes quantize(const Tensor& x, int64_t pad) {
  const Codes codes = empty_image_codes(x, pad);
  const Tensor dense = code_order(x);
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    return run(data<T>(dense), x.numel(), image_of(x, pad), codes), 0;
  });
  return codes;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(quantize)
