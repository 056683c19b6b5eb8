// Products of images with packed weights: out (positions x outputs) = window of the input x weight.
//
// Weights (pack_weight): for each panel of 32 outputs, each chunk of kDepth input channels and each tap of the kernel two
// tiles of 16 outputs. A tile has 16 rows of 64 bytes (fp16 32, fp64 128): kGroup channels, adjacent, for each of its 16
// outputs. It is what the tile unit multiplies, and one row is what a 512-bit dot product takes.
//
// Inputs: the padded pixels that a block of positions sees, as [chunk][pixel][kDepth]: then 16 positions of one tap are 16
// rows at equal distance, whatever the size of the picture, its memory order and the channels.
#pragma once

#include <atomic>

#include "strips.h"
#include "workspace.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// Of a 2 MB L2: the packed input; and with it the weights of one panel and of the next, which are fetched meanwhile.
constexpr int64_t kCached = int64_t(704) << 10, kCachedAll = 1900000;

// How a product is cut: `rows` of output at a time, `chunks` of channels at a time, panels in `parts`.
struct Cut {
  int64_t rows, chunks, parts;

  template <class P>
  static Cut of(const Convolution& c) {
    const int64_t all = c.n * c.out_h(), w = c.out_w(), panels = (c.outputs + kOutputs - 1) / kOutputs;
    const int64_t chunks = std::max<int64_t>(1, (c.channels + kDepth<P> - 1) / kDepth<P>);
    const int64_t pixel = kPixel<P>, weights = panels * kOutputs * chunks * c.taps() * pixel;
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    Cut best{1, 1, 1};
    double least = std::numeric_limits<double>::infinity();
    for (int64_t positions = 128; positions <= 2048; positions *= 2) {
      const int64_t rows = std::clamp<int64_t>(positions / w, 1, all), times = (all + rows - 1) / rows;
      const int64_t seen = (std::min(rows, c.out_h()) * c.stride + c.kernel - 1) * c.padded_w() *
                           std::max<int64_t>(1, rows / c.out_h());
      const int64_t at_once = std::clamp<int64_t>(kCached / (seen * pixel), 1, chunks);
      const int64_t blocks = (chunks + at_once - 1) / at_once;
      const int64_t parts = std::min((threads + times - 1) / times, panels);
      // bytes that one thread moves: weights, sums between blocks of channels, packed input
      const double turns = double((times * parts + threads - 1) / threads);
      const double moved = turns * (double(weights) / double(parts) + 8.0 * double(blocks - 1) * double(rows * w * c.outputs) / double(parts) +
                                    2.0 * double(seen * pixel * chunks));
      if (moved < least) {
        least = moved;
        best = {rows, (chunks + blocks - 1) / blocks, parts};
      }
    }
    return best;
  }
};

// The rows of a block of sums that wait to be put away, some at a time beside the next block's sums. put.panel(first
// position, first output) says where to, its row(sums, position) takes 32 sums.
template <class P, class Put>
struct Pending {
  typedef typename P::Sum Sum;
  typename Put::Panel panel = {};
  const Sum* sums = nullptr;
  const int32_t *position = nullptr, *end = nullptr;

  void some(int rows) {
    for (; rows > 0 && position != end; --rows, ++position, sums += kOutputs)
      if (*position >= 0) panel.row(sums, *position);
  }
};

template <class P, class Source, class Put>
inline void product(const Convolution& c, const Source& source, const typename P::Weight* weight,
                    typename P::In outside, const Put& put) {
  typedef typename P::In In;
  typedef typename P::Sum Sum;
  constexpr int64_t depth = kDepth<P>, block_size = kPositions * kOutputs;
  const int64_t all = c.n * c.out_h(), panels = (c.outputs + kOutputs - 1) / kOutputs;
  if (all * c.out_w() == 0 || panels == 0) return;
  const int64_t chunks = (c.channels + depth - 1) / depth, taps = c.taps();
  const int64_t panel_size = chunks * taps * 2 * kTileSize<P>;
  const Cut cut = Cut::of<P>(c);
  const bool whole = cut.chunks >= chunks;  // sums are made at once
  const int64_t strips = (all + cut.rows - 1) / cut.rows;
  std::vector<int64_t> offsets(static_cast<size_t>(taps));
  for (int64_t t = 0; t < taps; ++t) offsets[size_t(t)] = (t / c.kernel * c.padded_w() + t % c.kernel) * depth;
  const int64_t tasks = strips * cut.parts;
  std::atomic<int64_t> next{0};  // a thread that is held up leaves its share to the others
  parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    Workspace& workspace = Workspace::of_thread();
    [[maybe_unused]] const typename Blocks<P>::Scope scope;
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t begin = task / cut.parts * cut.rows, end = std::min(begin + cut.rows, all);
      const int64_t part = task % cut.parts;
      const int64_t first = part * panels / cut.parts, last = (part + 1) * panels / cut.parts;
      const Strip strip(c, begin, end);
      const int64_t tiles = int64_t(strip.start.size()), pairs = (tiles + 1) / 2;
      const Window window{offsets.data(), int(taps), strip.pixels * depth, c.stride * depth};
      In* input = nullptr;
      Sum* sums = nullptr;
      workspace.lay_out([&] {
        input = workspace.take<In>(std::min(cut.chunks, chunks) * strip.pixels * depth);
        sums = workspace.take<Sum>((whole ? 2 : pairs * (last - first)) * block_size);
      });
      Pending<P, Put> pending;
      for (int64_t k = 0; k < chunks || k == 0; k += cut.chunks) {
        const int64_t some = std::min(cut.chunks, chunks - k);
        Packer<P, Source>{c, source, outside, k * depth, some, strip.pixels}(begin, end, input);
        const int turns = int(std::max<int64_t>(1, some * taps));
        int64_t turn = 0;
        const auto block = [&](int64_t panel, int64_t pair) {
          Sum* const at = sums + (whole ? turn++ % 2 : (panel - first) * pairs + pair) * block_size;
          const int64_t t = 2 * pair, output = panel * kOutputs;
          const In* const a = input + strip.start[size_t(t)] * depth;
          const In* const b = t + 1 < tiles ? input + strip.start[size_t(t + 1)] * depth : nullptr;
          const int32_t* const pixels = strip.out.data() + t * kTile;
          const int count = int(std::min<int64_t>(2, tiles - t)) * kTile;
          const bool done = k + some >= chunks;
          const auto panel_put = put.panel(begin * c.out_w(), output);
          if (done)
            for (int i = 0; i < count; ++i)
              if (pixels[i] >= 0) panel_put.prefetch(pixels[i]);
          const typename P::Weight* const w = weight + panel * panel_size + k * taps * 2 * kTileSize<P>;
          const int64_t bytes = turns * 2 * kTileSize<P> * int64_t(sizeof(*w));
          const char* ahead = reinterpret_cast<const char*>(w + panel_size) + bytes * pair / pairs / 64 * 64;
          const bool fits = panel + 1 < last && 2 * bytes + some * strip.pixels * kPixel<P> <= kCachedAll;
          const int64_t lines = fits ? (bytes / pairs / 64 + turns - 1) / turns : 0;
          const int rows = (kPositions + turns - 1) / turns;
          Blocks<P>::block(a, b, window, w, some, at, k > 0, c.outputs - output <= kTile, [&] {
            for (int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            pending.some(rows);
          });
          pending.some(kPositions);
          if (done) pending = {panel_put, at, pixels, pixels + count};
        };
        if (taps == 1 && some * kPixel<P> * kPositions <= 24576) {  // the input's block stays in L1
          for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t panel = first; panel < last; ++panel) block(panel, pair);
        } else {
          for (int64_t panel = first; panel < last; ++panel)
            for (int64_t pair = 0; pair < pairs; ++pair) block(panel, pair);
        }
      }
      pending.some(kPositions);
      workspace.shrink();
    }
  });
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
