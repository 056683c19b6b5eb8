// pack_weight: weights in the order in which products read them (common/product.h).
#include "common/dispatch.h"
#include "common/product.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

template <class P>
void run(const typename P::Weight* w, int64_t outputs, int64_t channels, int64_t taps, typename P::Weight* to) {
  typedef typename P::Weight W;
  constexpr int64_t depth = kDepth<P>, group = P::kGroup;
  const int64_t panels = (outputs + kOutputs - 1) / kOutputs, chunks = (channels + depth - 1) / depth;
  parallel_for(0, panels * chunks, grain(kOutputs * depth * taps), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / chunks, from = i % chunks * depth, some = std::min(depth, channels - from);
      W* const block = to + i * taps * 2 * kTileSize<P>;
      std::fill(block, block + taps * 2 * kTileSize<P>, W{});
      for (int64_t o = 0; o < std::min<int64_t>(kOutputs, outputs - panel * kOutputs); ++o) {
        const W* row = w + ((panel * kOutputs + o) * channels + from) * taps;
        W* const column = block + o / kTile * kTileSize<P> + o % kTile * group;
        for (int64_t k = 0; k < some; ++k)
          for (int64_t t = 0; t < taps; ++t)
            column[t * 2 * kTileSize<P> + k / group * kTile * group + k % group] = *row++;
      }
    }
  });
}

}  // namespace

Tensor pack_weight(const Tensor& weight) {
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  int64_t taps = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) taps *= weight.size(d);
  const Tensor dense = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const auto packed = [&](auto product) {
    using P = decltype(product);
    using W = typename P::Weight;
    const Sizes sizes{(outputs + kOutputs - 1) / kOutputs, (channels + kDepth<P> - 1) / kDepth<P>, taps, 2, kTile, kTile,
                      P::kGroup};
    const Tensor to = empty_strided(weight, sizes, strides_in(sizes, row_major(sizes.size())));
    if (to.numel() > 0) run<P>(data<W>(dense), outputs, channels, taps, mutable_data<W>(to));
    return to;
  };
  if (weight.scalar_type() == ScalarType::Char) return packed(Codes8{});
  return dispatch(weight, [&](auto tag) { return packed(Plain<decltype(tag)>{}); });
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(pack_weight)
