// upsample2x: out[n, c, i, j] = x[n, c, i / 2, j / 2], in x's memory order. Moves bytes, knows no dtype.
#include "common/dispatch.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

// One line of w pixels of `pixel` elements becomes two lines of 2 w.
template <class E>
void double_line(const E* in, E* out, int64_t w, int64_t pixel) {
  if (pixel == 1) {
    for (int64_t j = 0; j < w; ++j) out[2 * j] = out[2 * j + 1] = in[j];
  } else {
    for (int64_t j = 0; j < w; ++j) {
      std::memcpy(out + 2 * j * pixel, in + j * pixel, size_t(pixel) * sizeof(E));
      std::memcpy(out + (2 * j + 1) * pixel, in + j * pixel, size_t(pixel) * sizeof(E));
    }
  }
  std::memcpy(out + 2 * w * pixel, out, size_t(2 * w * pixel) * sizeof(E));
}

template <class E>
int run(const Tensor& x, const Tensor& out, int64_t lines, int64_t w, int64_t pixel) {
  const E* in = data<E>(x);
  E* to = mutable_data<E>(out);
  parallel_for(0, lines, grain(4 * w * pixel), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) double_line(in + i * w * pixel, to + 4 * i * w * pixel, w, pixel);
  });
  return 0;
}

}  // namespace

Tensor upsample2x(const Tensor& x) {
  const bool last = is_channels_last(x);
  const Tensor dense = last || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Sizes s = sizes_of(x);
  Tensor out = empty_in(x, {s[0], s[1], 2 * s[2], 2 * s[3]}, last);
  const int64_t pixel = last ? s[1] : 1, lines = s[0] * s[2] * (last ? 1 : s[1]);
  if (lines * pixel * s[3] == 0) return out;
  switch (x.element_size()) {
    case 2: run<uint16_t>(dense, out, lines, s[3], pixel); break;
    case 4: run<uint32_t>(dense, out, lines, s[3], pixel); break;
    case 8: run<uint64_t>(dense, out, lines, s[3], pixel); break;
    default: LDMFAST_CHECK(false, "upsample2x takes elements of 2, 4 or 8 bytes");
  }
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(upsample2x)
