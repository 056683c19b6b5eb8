// quantize: uint8 codes of a tensor, with a border for the convolution that reads them.
#include "common/q8.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr int64_t kPart = 16384;  // elements read at a time

template <class T>
Range span(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Lanes<A> lanes;
  int64_t i = 0;
  for (; i + L <= n; i += L) lanes.add(load(x + i));
  if (i < n) lanes.add(load(x + i, int(n - i)));
  return lanes.range();
}

template <class T>
void encode(const T* x, uint8_t* q, int64_t n, const Coder<Acc<T>>& coder) {
  constexpr int L = kLanes<Acc<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_codes(q + i, coder(load(x + i)));
  if (const int rest = int(n - i)) store_codes(q + i, coder(load(x + i, rest)), rest);
}

template <class T>
void run(const T* x, int64_t n, const Image& image, const Codes& codes) {
  const int64_t parts = (n + kPart - 1) / kPart;
  const auto size = [&](int64_t i) { return std::min(kPart, n - i * kPart); };
  const Coder<Acc<T>> coder = finish<Acc<T>>(codes, parallel_range(parts, 2, [&](int64_t begin, int64_t end) {
    Range all;
    for (int64_t i = begin; i < end; ++i) all.join(span(x + i * kPart, size(i)));
    return all;
  }));
  uint8_t* q = mutable_data<uint8_t>(std::get<0>(codes));
  image.fill_border(q, coder.zero_point);
  if (image.pad == 0) {
    parallel_for(0, parts, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) encode(x + i * kPart, q + i * kPart, size(i), coder);
    });
  } else {
    const int64_t columns = image.w * image.c;
    parallel_for(0, image.n * image.h, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        encode(x + i * columns, q + image.at(i / image.h, i % image.h * image.w), columns, coder);
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
