// philox_normal: what torch's CUDA generator draws. Thread i of S draws numbers i, i + S, i + 2 S and i + 3 S of each
// piece of 4 S in one call; the count of calls is the counter's lower half, i the upper one.
#include "common/philox.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr int64_t kBlock = 256;  // threads of a block of torch's kernels that draw

// Threads first to first + kWords of one call; numbers past the end are not written.
void draw(uint64_t seed, uint64_t step, int64_t first, int64_t threads, int64_t left, float* out) {
  W c[4];
  for (int i = 0; i < kWords; ++i) {
    c[0][i] = uint32_t(step);
    c[1][i] = uint32_t(step >> 32);
    c[2][i] = uint64_t(first + i);
    c[3][i] = 0;
  }
  philox(c, seed);
  for (int pair = 0; pair < 2 && 2 * pair * threads + first < left; ++pair) {
    HalfF number[2];
    box_muller(c[2 * pair], c[2 * pair + 1], number[0], number[1]);
    for (int i = 0; i < 2; ++i) {
      const int64_t at = (2 * pair + i) * threads + first, here = std::min<int64_t>(kWords, left - at);
      if (here > 0) std::memcpy(out + at, &number[i], size_t(here) * sizeof(float));
    }
  }
}

}  // namespace

Tensor philox_normal(const Tensor& state, int64_t count, int64_t threads) {
  LDMFAST_CHECK(state.scalar_type() == ScalarType::Long && state.dim() == 2 && state.size(1) == 2 && count >= 0 &&
                    threads >= kBlock && threads % kBlock == 0,
                "philox_normal: state is int64 of (N, 2), threads whole blocks");
  const int64_t n = state.size(0);
  Tensor out = empty_strided(state, {n, count}, {count > 1 ? count : 1, 1}, aoti_torch_dtype_float32());
  if (n * count == 0) return out;
  threads = std::min(threads, (count + kBlock - 1) / kBlock * kBlock);
  const int64_t calls = (count + 4 * threads - 1) / (4 * threads), blocks = threads / kBlock;
  const int64_t *from = data<int64_t>(state), row = state.stride(0), column = state.stride(1);
  float* const to = mutable_data<float>(out);
  parallel_for(0, n * calls * blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t i = b / blocks / calls, call = b / blocks % calls, first = b % blocks * kBlock;
      const uint64_t seed = uint64_t(from[i * row]), step = (uint64_t(from[i * row + column]) >> 2) + uint64_t(call);
      const int64_t done = call * 4 * threads;
      for (int64_t t = first; t < first + kBlock; t += kWords)
        draw(seed, step, t, threads, count - done, to + i * count + done);
    }
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(philox_normal)
