// How group_norm_silu is cut into CUDA blocks, and where each block finds its numbers. Plain arithmetic, no CUDA and
// no torch: tests/plan_check.cpp runs it on the host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LDMFAST_HOST_DEVICE __host__ __device__
#else
#define LDMFAST_HOST_DEVICE
#endif

namespace ldmfast {

// Division by a number known at launch, exact for 0 <= x < 2^31 (Granlund and Montgomery 1994, figure 4.1).
struct Divisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while (shift < 32 && (uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - d) << 32) / d + 1);
  }
  LDMFAST_HOST_DEVICE uint32_t divide(uint32_t x) const {
    const uint32_t high = uint32_t((uint64_t(x) * multiplier) >> 32);
    return (high + x) >> shift;
  }
};

LDMFAST_HOST_DEVICE inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct GroupNormPlan {
  static constexpr int kThreads = 256;
  static constexpr int kMaxTileGroups = 256;             // statistics of a tile's groups fit in 3 KB of shared memory
  static constexpr int kMaxOnePassWidth = 512;           // channels whose parameters are kept beside the group
  static constexpr int64_t kOnePassBytes = 32 * 1024;    // with those (12 KB in fp64) within the 48 KB that need no
                                                         // opt-in, and three blocks on a multiprocessor at 80 registers
  static constexpr int64_t kScalarOnePass = 2048;        // elements: 8 loads a thread, where width does not matter

  int64_t batch = 0, channels = 0, pixels = 0, groups = 0, width = 0;  // width: channels of a group
  bool last = false;      // channels-last: (batch, pixels, channels); otherwise (batch, channels, pixels)
  bool one_pass = false;  // a block keeps one group in shared memory; otherwise statistics, then normalisation
  int vector = 1;         // elements of one load
  int64_t splits = 1;     // blocks that share the statistics of one group
  int64_t piece = 0;      // of each: pixels (channels-last) or elements of the group (otherwise)
  int64_t tile_groups = 1, tiles = 1;  // channels-last: groups that a block walks together

  int64_t blocks() const { return one_pass ? batch * groups : batch * splits * (last ? tiles : groups); }
  LDMFAST_HOST_DEVICE int64_t extent() const { return last ? pixels : pixels * width; }  // what splits share

  LDMFAST_HOST_DEVICE int64_t piece_begin(int64_t split) const { return split * piece; }
  LDMFAST_HOST_DEVICE int64_t piece_end(int64_t split) const {
    const int64_t end = (split + 1) * piece;
    return end < extent() ? end : extent();
  }
  // Elements of one group in one piece.
  LDMFAST_HOST_DEVICE int64_t piece_count(int64_t split) const {
    return (piece_end(split) - piece_begin(split)) * (last ? width : 1);
  }
  LDMFAST_HOST_DEVICE int64_t tile_begin(int64_t tile) const { return tile * tile_groups; }
  LDMFAST_HOST_DEVICE int64_t tile_end(int64_t tile) const {
    const int64_t end = (tile + 1) * tile_groups;
    return end < groups ? end : groups;
  }
  // First element of a group. Products are 64 bits wide: a decoder's tensors pass 2^31 elements.
  LDMFAST_HOST_DEVICE int64_t group_begin(int64_t n, int64_t group) const {
    return n * channels * pixels + group * width * (last ? 1 : pixels);
  }
  // Where a (mean, squared deviations) pair is kept, in pairs.
  LDMFAST_HOST_DEVICE int64_t partial_index(int64_t n, int64_t group, int64_t split) const {
    return (n * groups + group) * splits + split;
  }
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t r = a % b;
    a = b;
    b = r;
  }
  return a;
}

// aligned: whether input and output start on 16 bytes. The plan depends on a picture's size, never on the batch: a
// picture's sums must not depend on what shares its batch.
inline GroupNormPlan group_norm_plan(int64_t batch, int64_t channels, int64_t pixels, int64_t groups, bool last,
                                     int64_t element_size, bool aligned, int64_t processors) {
  GroupNormPlan p;
  p.batch = batch, p.channels = channels, p.pixels = pixels, p.groups = groups, p.last = last;
  p.width = channels / groups;
  const int64_t wide = element_size == 8 ? 1 : 16 / element_size, elements = p.width * pixels;
  const bool runs = aligned && (last ? p.width : pixels) % wide == 0;  // a load stays within one group and channel
  if ((runs || elements <= GroupNormPlan::kScalarOnePass) && p.width <= GroupNormPlan::kMaxOnePassWidth &&
      elements * element_size <= GroupNormPlan::kOnePassBytes) {
    p.one_pass = true;
    p.vector = runs ? int(wide) : 1;
    p.piece = p.extent();
    return p;
  }
  const bool vectors = aligned && (last ? channels : pixels) % wide == 0;
  p.vector = vectors ? int(wide) : 1;
  int64_t least = GroupNormPlan::kThreads * p.vector * 4;  // four loads a thread, or a block is mostly its reduction
  if (last) {
    const int64_t step = p.vector / greatest_common_divisor(p.vector, p.width);  // tiles begin on a whole vector
    int64_t fit = GroupNormPlan::kThreads * p.vector / p.width;                  // one column of loads a thread
    if (fit > GroupNormPlan::kMaxTileGroups) fit = GroupNormPlan::kMaxTileGroups;
    if (fit > groups) fit = groups;
    p.tile_groups = fit < step ? step : fit / step * step;
    p.tiles = ceil_divide(groups, p.tile_groups);
    least = ceil_divide(least, p.tile_groups * p.width);
  }
  const int64_t wanted = ceil_divide(8 * processors, last ? p.tiles : groups);  // 8 blocks of 256 threads fill one
  const int64_t most = ceil_divide(p.extent(), least);
  p.splits = wanted < most ? wanted : most;
  p.piece = ceil_divide(ceil_divide(p.extent(), p.splits), p.vector) * p.vector;
  p.splits = ceil_divide(p.extent(), p.piece);
  return p;
}

// Loads of one row of a group that is kept on chip: a pixel's channels of the group, or a channel's pixels. Split
// groups have no such row (three channels are less than one load).
inline Divisor row_loads(const GroupNormPlan& p) {
  return p.one_pass ? Divisor(uint32_t((p.last ? p.width : p.pixels) / p.vector)) : Divisor();
}

}  // namespace ldmfast
