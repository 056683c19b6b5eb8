// Products of images with packed weights: out (positions x outputs) = window of the input x weight.
//
// Weights (pack_weight): for each panel of 32 outputs, each chunk of kDepth input channels and each tap of the kernel two
// tiles of 16 outputs. A tile has 16 rows of 64 bytes (fp16 32, fp64 128): kGroup channels, adjacent, for each of its 16
// outputs. It is what the tile unit multiplies, and one row is what a 512-bit dot product takes.
//
// Inputs: the padded pixels that a block of positions sees, as [chunk][pixel][kDepth]: then 16 positions of one tap are 16
// rows at equal distance, whatever the size of the picture, its memory order and the channels.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "stable.h"
#include "tile.h"
#include "workspace.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// Input, weight and sum types of a product.
template <class T>
struct Plain {
  typedef T In;
  typedef T Weight;
  typedef Acc<T> Sum;
  static constexpr int kGroup = std::is_same_v<T, bf16> ? 2 : 1;
};
struct Codes8 {
  typedef uint8_t In;
  typedef int8_t Weight;
  typedef int32_t Sum;
  static constexpr int kGroup = 4;
};

constexpr int kTile = 16;     // positions, or outputs, or groups of channels of a tile
constexpr int kOutputs = 32;  // outputs of a panel: two tiles
constexpr int kPositions = 32;
template <class P>
constexpr int kDepth = kTile * P::kGroup;  // channels of a chunk
template <class P>
constexpr int64_t kTileSize = kTile * kTile * P::kGroup;  // numbers of a tile of weights
template <class P>
constexpr int64_t kPixel = kDepth<P> * int64_t(sizeof(typename P::In));  // bytes of a chunk of a pixel

// What one chunk of sums needs: `taps` offsets into the input, for each `chunks` steps of `chunk` numbers.
struct Window {
  const int64_t* offsets;  // of each tap, in numbers
  int taps;
  int64_t chunk, row;  // from one chunk to the next, from one position to the next
};

// ---- sums by vectors ----

template <class P>
using SumVector = std::conditional_t<std::is_same_v<typename P::Sum, int32_t>, I, Vector<std::conditional_t<
    std::is_same_v<typename P::Sum, int32_t>, float, typename P::Sum>>>;

// sum += the group of channels at `a` times those of each lane's output at `b`.
template <class P>
inline void add_group(SumVector<P>& sum, const typename P::In* a, const typename P::Weight* b) {
  if constexpr (std::is_same_v<P, Codes8>) {
    uint32_t word;
    std::memcpy(&word, a, 4);
    I columns;
    std::memcpy(&columns, b, sizeof columns);
#if defined(__AVX512VNNI__)
    sum = (I)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(int(word)), (__m512i)columns);
#else
    for (int i = 0; i < 4; ++i) sum += (columns << (24 - 8 * i) >> 24) * int32_t(word >> (8 * i) & 255);
#endif
  } else if constexpr (std::is_same_v<typename P::In, bf16>) {
#if defined(__AVX512BF16__)
    sum = DotStep::step(sum, DotStep::splat_row(a), DotStep::load_columns(b));
#else
    U columns;
    std::memcpy(&columns, b, sizeof columns);
    sum += (F)(columns << 16) * to_float(a[0]) + (F)(columns & 0xffff0000u) * to_float(a[1]);
#endif
  } else if constexpr (std::is_same_v<typename P::In, double>) {
    sum += load(b) * *a;
  } else {
    sum += load(b) * to_float(*a);
  }
}

template <class P>
struct VectorBlocks {
  typedef typename P::In In;
  typedef typename P::Weight Weight;
  typedef typename P::Sum Sum;
  typedef SumVector<P> V;
  struct Scope {};
  static constexpr int L = int(sizeof(V) / sizeof(Sum)), kVectors = kTile / L;
#if defined(__AVX512F__)
  static constexpr int kRows = 8 / kVectors;
#else
  static constexpr int kRows = kVectors <= 2 ? 2 : 1;
#endif

  template <int rows>
  static void some(const In* a, const Window& w, const Weight* b, int64_t chunks, Sum* c, bool add) {
    V sum[rows][2 * kVectors];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < 2 * kVectors; ++v) {
        sum[r][v] = V{};
        if (add) std::memcpy(&sum[r][v], c + r * kOutputs + v * L, sizeof(V));
      }
    for (int64_t k = 0; k < chunks; ++k, a += w.chunk)
      for (int t = 0; t < w.taps; ++t, b += 2 * kTileSize<P>) {
        const In* at = a + w.offsets[t];
        const Weight* column = b;
        for (int g = 0; g < kTile; ++g, at += P::kGroup, column += kTile * P::kGroup)
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < 2 * kVectors; ++v)
              add_group<P>(sum[r][v], at + r * w.row,
                           column + (v / kVectors) * kTileSize<P> + (v % kVectors) * L * P::kGroup);
      }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < 2 * kVectors; ++v) std::memcpy(c + r * kOutputs + v * L, &sum[r][v], sizeof(V));
  }

  // c (32 x 32) = or += the products of one or two tiles of positions; `narrow`: of the first 16 outputs only. meanwhile()
  // may be called any number of times.
  template <class Fn>
  static void block(const In* first, const In* second, const Window& w, const Weight* b, int64_t chunks, Sum* c,
                    bool add, bool, const Fn&) {
    for (const In* a : {first, second}) {
      if (a == nullptr) return;
      for (int r = 0; r < kTile; r += kRows) some<kRows>(a + r * w.row, w, b, chunks, c + r * kOutputs, add);
      c += kTile * kOutputs;
    }
  }
};

// ---- sums by tiles ----

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__)
template <class P>
struct TileBlocks {
  typedef typename P::In In;
  typedef typename P::Weight Weight;
  typedef typename P::Sum Sum;
  typedef Amx::Scope Scope;

  template <int c, int a, int b>
  static void dot() {
    if constexpr (std::is_same_v<P, Codes8>)
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
    else
      Amx::dot<c, a, b>();
  }
  template <int t>
  static void begin(const Sum* c, bool add) {
    if (add)
      Amx::load_tile<t>(c, kOutputs * 4);
    else
      asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }

  // Vector instructions in meanwhile() run beside the tile unit, which the order of instructions alone would not reach.
  template <bool two, bool narrow, class Fn>
  static void sums(const In* first, const In* second, const Window& w, const Weight* b, int64_t chunks, Sum* c, bool add,
                   const Fn& meanwhile) {
    const int64_t row = w.row * int64_t(sizeof(In)), apart = second - first;
    Sum* const below = c + kTile * kOutputs;
    int steps = 0;
    begin<0>(c, add);
    if constexpr (!narrow) begin<1>(c + kTile, add);
    if constexpr (two) begin<2>(below, add);
    if constexpr (two && !narrow) begin<3>(below + kTile, add);
    for (int64_t k = 0; k < chunks; ++k, first += w.chunk)
      for (int t = 0; t < w.taps; ++t, b += 2 * kTileSize<P>) {
        const In* const a = first + w.offsets[t];
        Amx::load_tile<6>(b, 64);
        Amx::load_tile<4>(a, row);
        dot<0, 4, 6>();
        if constexpr (!narrow) {
          Amx::load_tile<7>(b + kTileSize<P>, 64);
          dot<1, 4, 7>();
        }
        if constexpr (two) {
          Amx::load_tile<5>(a + apart, row);
          dot<2, 5, 6>();
          if constexpr (!narrow) dot<3, 5, 7>();
        }
        // a store that comes after 750 ns without one takes 250 ns: this one, of no use, keeps its unit awake
        if ((++steps & 15) == 0) Amx::store_tile<6>(c, kOutputs * 4);
        meanwhile();
      }
    Amx::store_tile<0>(c, kOutputs * 4);
    if constexpr (!narrow) Amx::store_tile<1>(c + kTile, kOutputs * 4);
    if constexpr (two) Amx::store_tile<2>(below, kOutputs * 4);
    if constexpr (two && !narrow) Amx::store_tile<3>(below + kTile, kOutputs * 4);
  }

  template <class Fn>
  static void block(const In* first, const In* second, const Window& w, const Weight* b, int64_t chunks, Sum* c,
                    bool add, bool narrow, const Fn& meanwhile) {
    if (narrow && second != nullptr) return sums<true, true>(first, second, w, b, chunks, c, add, meanwhile);
    if (narrow) return sums<false, true>(first, first, w, b, chunks, c, add, meanwhile);
    if (second != nullptr) return sums<true, false>(first, second, w, b, chunks, c, add, meanwhile);
    sums<false, false>(first, first, w, b, chunks, c, add, meanwhile);
  }
};
template <class P>
using Blocks = std::conditional_t<std::is_same_v<P, Codes8> || std::is_same_v<P, Plain<bf16>>, TileBlocks<P>,
                                  VectorBlocks<P>>;
#else
template <class P>
using Blocks = VectorBlocks<P>;
#endif

// ---- where positions lie ----

struct Convolution {
  int64_t n = 1, channels = 0, h = 1, w = 0, outputs = 0, kernel = 1, stride = 1, padding = 0;
  int64_t picture = 0, line = 0, pixel = 0;  // strides of the input, in numbers; those of a channel are 1
  bool upsample = false;                     // of the input, by nearest neighbours, before the convolution

  int64_t in_h() const { return upsample ? 2 * h : h; }
  int64_t in_w() const { return upsample ? 2 * w : w; }
  int64_t out_h() const { return (in_h() + 2 * padding - kernel) / stride + 1; }
  int64_t out_w() const { return (in_w() + 2 * padding - kernel) / stride + 1; }
  int64_t padded_w() const { return in_w() + 2 * padding; }
  int64_t taps() const { return kernel * kernel; }
  // Whether every output pixel is one input pixel, and pixels are at equal distances.
  bool pointwise() const {
    return kernel == 1 && stride == 1 && padding == 0 && !upsample && (h == 1 || line == w * pixel) &&
           (n == 1 || picture == h * line);
  }
};

// Output rows [begin, end), counted through all pictures, as packed pixels and tiles of 16 positions.
struct Strip {
  int64_t pixels = 0;          // packed, with what the last tile reads beyond
  std::vector<int64_t> start;  // of each tile, in packed pixels
  std::vector<int32_t> out;    // of each tile's 16 positions the output pixel, counted from the strip's first, or -1

  Strip(const Convolution& c, int64_t begin, int64_t end) {
    const int64_t w = c.out_w(), rows = c.out_h(), wide = c.padded_w();
    if (c.pointwise()) {
      add_run(0, 0, (end - begin) * w, 1, (end - begin) * w);
      pixels = (end - begin) * w + kTile;
      return;
    }
    for (int64_t row = begin; row < end;) {
      const int64_t some = std::min(end, row / rows * rows + rows) - row;  // of one picture
      const int64_t first = (row - begin) * w;
      // tiles run on over the border where that makes fewer of them
      if (c.stride == 1 && ((some - 1) * wide + w + kTile - 1) / kTile < some * ((w + kTile - 1) / kTile))
        add_run(pixels, first, w, some, wide);
      else
        for (int64_t y = 0; y < some; ++y) add_run(pixels + y * c.stride * wide, first + y * w, w, 1, w, c.stride);
      pixels += ((some - 1) * c.stride + c.kernel) * wide;
      row += some;
    }
    pixels += kTile * c.stride + c.kernel;
  }

 private:
  // Tiles over `lines` lines, one every `wide` positions, of which the first w count.
  void add_run(int64_t pixel, int64_t first, int64_t w, int64_t lines, int64_t wide, int64_t stride = 1) {
    int64_t x = 0, y = 0;
    for (int64_t at = 0; at < (lines - 1) * wide + w; at += kTile) {
      start.push_back(pixel + at * stride);
      for (int i = 0; i < kTile; ++i) {
        out.push_back(x < w && y < lines ? int32_t(first + y * w + x) : -1);
        if (++x == wide) x = 0, ++y;
      }
    }
  }
};

// Where packed numbers come from: source.chunk<whole>(to, picture, at, channel, count) makes `count` of them, from element
// `at` of the input on, which is channel `channel` of a picture; whole: count is kDepth.
template <class In>
struct Copied {
  const In* x;

  void prefetch(int64_t at) const { __builtin_prefetch(x + at); }
  template <int64_t whole>
  void chunk(In* to, int64_t, int64_t at, int64_t, int64_t count) const {
    std::memcpy(static_cast<void*>(to), x + at, size_t(whole > 0 ? whole : count) * sizeof(In));
  }
};

// Packs channels [from, from + chunks * kDepth) of the strip's pixels as [chunk][pixel][kDepth]; `outside` is what the
// border holds.
template <class P, class Source>
struct Packer {
  typedef typename P::In In;
  static constexpr int64_t depth = kDepth<P>, kSome = 8;  // pixels at a time: chunks lie a page or more apart
  const Convolution& c;
  const Source& source;
  In outside;
  int64_t from, chunks, pixels;

  void fill(In* to, int64_t begin, int64_t end, In value) const {
    for (int64_t k = 0; k < chunks; ++k)
      std::fill(to + (k * pixels + begin) * depth, to + (k * pixels + end) * depth, value);
  }

  // n pixels from element `line` on, each of them 1 << twice times.
  void copy(int64_t picture, int64_t line, int64_t n, int twice, In* to) const {
    const int64_t count = std::min(chunks * depth, c.channels - from), whole = count / depth, rest = count % depth;
    for (int64_t i = 0; i < n; i += kSome) {
      const int64_t last = std::min(i + kSome, n);
      for (int64_t k = 0; k < whole; ++k)
        for (int64_t j = i; j < last; ++j) {
          const int64_t at = line + (j >> twice) * c.pixel + k * depth;
          source.prefetch(at + kSome * c.pixel);
          source.template chunk<depth>(to + (k * pixels + j) * depth, picture, at, from + k * depth, depth);
        }
      if (rest == 0) continue;
      for (int64_t j = i; j < last; ++j) {
        In* const out = to + (whole * pixels + j) * depth;
        source.template chunk<0>(out, picture, line + (j >> twice) * c.pixel + whole * depth, from + whole * depth, rest);
        std::fill(out + rest, out + depth, In{});
      }
    }
  }

  void operator()(int64_t begin, int64_t end, In* to) const {
    const int64_t rows = c.out_h(), wide = c.padded_w();
    const bool pointwise = c.pointwise();
    fill(to, pixels - kTile * c.stride - c.kernel + 1, pixels, In{});  // what tiles read beyond the last pixel
    for (int64_t row = begin; row < end;) {
      const int64_t picture = row / rows, some = std::min(end, (picture + 1) * rows) - row;
      const int64_t first = picture * c.picture + from;
      if (pointwise) {
        copy(picture, first + row % rows * c.line, some * c.w, 0, to);
        to += some * c.w * depth;
        row += some;
        continue;
      }
      const int64_t top = row % rows * c.stride - c.padding, lines = (some - 1) * c.stride + c.kernel;
      for (int64_t y = top; y < top + lines; ++y, to += wide * depth) {
        if (y < 0 || y >= c.in_h()) {
          fill(to, 0, wide, outside);
          continue;
        }
        fill(to, 0, c.padding, outside);
        fill(to, c.padding + c.in_w(), wide, outside);
        const int twice = c.upsample ? 1 : 0;
        copy(picture, first + (y >> twice) * c.line, c.in_w(), twice, to + c.padding * depth);
      }
      row += some;
    }
  }
};

// ---- the whole ----

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
    static thread_local Workspace workspace;
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
