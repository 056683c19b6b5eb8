// Where the positions of a convolution lie, and its input packed strip by strip.
#pragma once

#include <algorithm>
#include <vector>

#include "sums.h"

namespace LDMFAST_LEVEL_NAMESPACE {

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

}  // namespace LDMFAST_LEVEL_NAMESPACE
