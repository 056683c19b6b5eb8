// group_norm_silu, and group_norm_silu_fp8 that ends in codes of 8 bits: y = silu((x + shift - mean_g) / sqrt(var_g + eps) * weight + bias), channels-last or not.
//
// Small groups: a block keeps one group in shared memory, one read and one write. Large groups: `splits` blocks take
// each group's statistics, then as many blocks normalise; the join of the splits is done by every normalising block
// for its own groups. csrc/common/group_norm_plan.h says which block has which numbers.
//
// Statistics: Welford within a thread, Chan's join between threads, warps and blocks; fp32 (fp64 for fp64).
#pragma once

#include "common/e4m3.h"
#include "common/group_norm_plan.h"
#include "common/layout.h"
#include "common/reduce.cuh"
#include "common/stable.h"
#include "common/tensor.cuh"

namespace ldmfast::cuda {
namespace {

constexpr int kThreads = GroupNormPlan::kThreads;
constexpr int kWarps = kThreads / kWarp;

struct Arguments {
  GroupNormPlan plan;
  Divisor columns;  // row_loads(plan)
  Parameter shift, weight, bias;
  double eps;
  bool silu;
  const float* code_scale;  // of e4m3 codes; null where the result has x's type
};

template <class A>
__device__ __forceinline__ A reciprocal_root(A variance, double eps) {
  return A(1) / sqrt(variance + A(eps));
}

// y = (x - centre) * gain + offset for one channel.
template <class A>
struct Affine {
  A centre, gain, offset;
};

template <class A>
__device__ __forceinline__ Affine<A> affine(const Arguments& a, int64_t n, int64_t c, A mean, A rstd) {
  return {mean - a.shift.at(n, c, A(0)), rstd * a.weight.at(c, A(1)), a.bias.at(c, A(0))};
}

__device__ __forceinline__ float code_factor(const Arguments& a) { return a.code_scale ? 1 / *a.code_scale : 1; }

// The numbers of one load, normalised: as O, which is T or, for e4m3 codes, uint8_t. affine(k): of the k-th number.
template <class O, int V, class T, class F>
__device__ __forceinline__ Pack<O, V> finish(const Pack<T, V>& x, const F& affine, bool with_silu, float factor) {
  using A = Acc<T>;
  const auto number = [&](int k) {
    const Affine<A> f = affine(k);
    const A y = (to<A>(x.v[k]) - f.centre) * f.gain + f.offset;
    return with_silu ? silu<T>(y) : y;
  };
  Pack<O, V> out;
  if constexpr (std::is_same_v<O, T>) {
#pragma unroll
    for (int k = 0; k < V; ++k) out.v[k] = from<T>(number(k));
  } else if constexpr (V == 1) {
    out.v[0] = uint8_t(ptx::e4m3_pair(float(number(0)) * factor, 0));
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      const uint16_t pair = ptx::e4m3_pair(float(number(k)) * factor, float(number(k + 1)) * factor);
      out.v[k] = uint8_t(pair), out.v[k + 1] = uint8_t(pair >> 8);
    }
  }
  return out;
}

// One block, one group; x, out: (batch, channels, pixels) in the plan's order. Loads are numbered row by row: a row is
// a pixel's channels of this group (channels-last) or a channel's pixels.
template <class T, class O, int V, bool kLast>
__global__ void __launch_bounds__(kThreads, 3) one_pass_kernel(const T* x, O* out, const __grid_constant__ Arguments a) {
  using A = Acc<T>;
  extern __shared__ uint4 kept[];
  __shared__ Affine<A> channel[GroupNormPlan::kMaxOnePassWidth];
  Pack<T, V>* keep = reinterpret_cast<Pack<T, V>*>(kept);
  const int64_t n = blockIdx.x / a.plan.groups, group = blockIdx.x % a.plan.groups;
  const int64_t base = a.plan.group_begin(n, group), first = group * a.plan.width;
  const int width = int(a.plan.width);
  const uint32_t loads = uint32_t(a.plan.width * a.plan.pixels / V);
  const int64_t row_stride = kLast ? a.plan.channels : a.plan.pixels;
  for (int c = threadIdx.x; c < width; c += kThreads) channel[c] = affine(a, n, first + c, A(0), A(1));
  __syncthreads();
  Moments<A> m;
  for (uint32_t i = threadIdx.x; i < loads; i += kThreads) {
    const uint32_t row = a.columns.divide(i), column = (i - row * a.columns.divisor) * V;
    const Pack<T, V> p = load<V>(x + base + row * row_stride + column);
    keep[i] = p;
#pragma unroll
    for (int k = 0; k < V; ++k) m.add(to<A>(p.v[k]) - channel[kLast ? column + k : row].centre);
  }
  m = join_block<kThreads>(m);
  const A rstd = reciprocal_root(m.m2 / m.n, a.eps);
  for (int c = threadIdx.x; c < width; c += kThreads) channel[c].centre += m.mean, channel[c].gain *= rstd;
  __syncthreads();
  const float factor = code_factor(a);
  for (uint32_t i = threadIdx.x; i < loads; i += kThreads) {  // each thread reads back what it kept itself
    const uint32_t row = a.columns.divide(i), column = (i - row * a.columns.divisor) * V;
    const auto affine_of = [&](int k) { return channel[kLast ? column + k : row]; };
    store<V>(out + base + row * row_stride + column, finish<O, V>(keep[i], affine_of, a.silu, factor));
  }
}

// Which part of the work a block has, for the two split kernels.
struct Part {
  int64_t n, split, index;  // index: tile (channels-last) or group
  __device__ __forceinline__ explicit Part(const GroupNormPlan& p) {
    const int64_t each = p.last ? p.tiles : p.groups;
    index = blockIdx.x % each;
    split = blockIdx.x / each % p.splits;
    n = blockIdx.x / each / p.splits;
  }
};

// The moments of a group, joined from its splits by one warp; in lane 0.
template <class A>
__device__ __forceinline__ Moments<A> join_splits(const GroupNormPlan& p, const A* partial, int64_t n, int64_t group) {
  Moments<A> m;
  for (int64_t s = threadIdx.x % kWarp; s < p.splits; s += kWarp) {
    const A* pair = partial + 2 * p.partial_index(n, group, s);
    m.join(A(p.piece_count(s)), pair[0], pair[1]);
  }
  return join_warp(m);
}

// Channels-last blocks walk their tile in rounds of at most kThreads columns of V adjacent channels. Threads form
// lanes x columns; lanes take every lanes-th pixel.
template <int V>
struct Round {
  int columns, width, lanes, lane, column;  // columns: of the tile; width: of a round
  __device__ __forceinline__ explicit Round(int64_t channels)
      : columns(int(channels / V)), width(min(columns, kThreads)), lanes(kThreads / width),
        lane(int(threadIdx.x) / width), column(int(threadIdx.x) % width) {}
};

// Channels-last statistics. partial: (batch, groups, splits, 2), mean and squared deviations.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) stats_last_kernel(const T* x, const __grid_constant__ Arguments a,
                                                                 Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A means[kThreads * V], squares[kThreads * V];  // [lane][channel of this round]
  __shared__ Moments<A> moments[GroupNormPlan::kMaxTileGroups];
  const GroupNormPlan& p = a.plan;
  const Part part(p);
  const int64_t group0 = p.tile_begin(part.index);
  const int groups = int(p.tile_end(part.index) - group0), width = int(p.width);
  const Round<V> round(groups * p.width);
  const int rows = int(p.piece_end(part.split) - p.piece_begin(part.split));
  const T* base = x + p.group_begin(part.n, group0) + p.piece_begin(part.split) * p.channels;
  for (int g = threadIdx.x; g < groups; g += kThreads) moments[g] = Moments<A>();
  for (int first = 0; first < round.columns; first += round.width) {
    A mean[V] = {}, m2[V] = {};
    if (round.lane < round.lanes && first + round.column < round.columns) {
      const T* from = base + int64_t(first + round.column) * V + round.lane * p.channels;
      A seen = 0;
#pragma unroll 2
      for (int r = round.lane; r < rows; r += round.lanes) {
        const Pack<T, V> value = load<V>(from);
        from += round.lanes * p.channels;
        seen += A(1);
        const A share = A(1) / seen;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A number = to<A>(value.v[k]), delta = number - mean[k];
          mean[k] += delta * share;
          m2[k] += delta * (number - mean[k]);
        }
      }
    }
    __syncthreads();  // the round before has been read, and the moments are set
    if (round.lane < round.lanes) {
#pragma unroll
      for (int k = 0; k < V; ++k) means[threadIdx.x * V + k] = mean[k], squares[threadIdx.x * V + k] = m2[k];
    }
    __syncthreads();
    const int c0 = first * V, c1 = min(first + round.width, round.columns) * V;
    for (int g = c0 / width + int(threadIdx.x) / kWarp; g * width < c1; g += kWarps) {
      const int begin = max(g * width, c0), part_width = min((g + 1) * width, c1) - begin;
      Moments<A> m;
      for (int i = threadIdx.x % kWarp; i < part_width * round.lanes; i += kWarp) {
        const int lane = i / part_width, c = begin + i % part_width, at = lane * round.width * V + (c - c0);
        const int count = lane < rows ? (rows - lane + round.lanes - 1) / round.lanes : 0;
        m.join(A(count), means[at] + a.shift.at(part.n, group0 * p.width + c, A(0)), squares[at]);
      }
      m = join_warp(m);
      if (threadIdx.x % kWarp == 0) moments[g].join(m.n, m.mean, m.m2);
    }
  }
  __syncthreads();
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    A* pair = partial + 2 * p.partial_index(part.n, group0 + g, part.split);
    pair[0] = moments[g].mean;
    pair[1] = moments[g].m2;
  }
}

// Channels-last normalisation over the same parts.
template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    apply_last_kernel(const T* x, O* out, const __grid_constant__ Arguments a,
                                                                 const Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A mean[GroupNormPlan::kMaxTileGroups], rstd[GroupNormPlan::kMaxTileGroups];
  __shared__ Affine<A> channel[kThreads * V];
  const GroupNormPlan& p = a.plan;
  const Part part(p);
  const int64_t group0 = p.tile_begin(part.index);
  const int groups = int(p.tile_end(part.index) - group0), width = int(p.width);
  for (int g = int(threadIdx.x) / kWarp; g < groups; g += kWarps) {
    const Moments<A> m = join_splits(p, partial, part.n, group0 + g);
    if (threadIdx.x % kWarp == 0) mean[g] = m.mean, rstd[g] = reciprocal_root(m.m2 / m.n, a.eps);
  }
  const Round<V> round(groups * p.width);
  const int rows = int(p.piece_end(part.split) - p.piece_begin(part.split));
  const int64_t base = p.group_begin(part.n, group0) + p.piece_begin(part.split) * p.channels;
  const float factor = code_factor(a);
  for (int first = 0; first < round.columns; first += round.width) {
    const int c0 = first * V, c1 = min(first + round.width, round.columns) * V;
    __syncthreads();  // the means are set, and the round before has been read
    for (int c = c0 + int(threadIdx.x); c < c1; c += kThreads)
      channel[c - c0] = affine(a, part.n, group0 * p.width + c, mean[c / width], rstd[c / width]);
    __syncthreads();
    if (round.lane >= round.lanes || first + round.column >= round.columns) continue;
    Affine<A> f[V];
#pragma unroll
    for (int k = 0; k < V; ++k) f[k] = channel[round.column * V + k];
    int64_t at = base + int64_t(first + round.column) * V + round.lane * p.channels;
#pragma unroll 2
    for (int r = round.lane; r < rows; r += round.lanes, at += round.lanes * p.channels) {
      const auto affine_of = [&](int k) { return f[k]; };
      store<V>(out + at, finish<O, V>(load<V>(x + at), affine_of, a.silu, factor));
    }
  }
}

// The channel, counted within its group, of the element i of a group that lies in one piece of memory.
__device__ __forceinline__ int64_t channel_of(int64_t i, int64_t pixels) {
  return i < INT32_MAX && pixels < INT32_MAX ? uint32_t(i) / uint32_t(pixels) : i / pixels;
}

// Contiguous statistics: a group is one piece of memory, split into `splits` runs of whole loads.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) stats_kernel(const T* x, const __grid_constant__ Arguments a,
                                                            Acc<T>* partial) {
  using A = Acc<T>;
  const GroupNormPlan& p = a.plan;
  const Part part(p);
  const T* base = x + p.group_begin(part.n, part.index);
  const int64_t first = part.index * p.width, end = p.piece_end(part.split);
  Moments<A> m;
#pragma unroll 2
  for (int64_t i = p.piece_begin(part.split) + int64_t(threadIdx.x) * V; i < end; i += kThreads * V) {
    const Pack<T, V> value = load<V>(base + i);
    const A shift = a.shift.data ? a.shift.at(part.n, first + channel_of(i, p.pixels), A(0)) : A(0);
#pragma unroll
    for (int k = 0; k < V; ++k) m.add(to<A>(value.v[k]) + shift);
  }
  m = join_block<kThreads>(m);
  if (threadIdx.x == 0) {
    A* pair = partial + 2 * p.partial_index(part.n, part.index, part.split);
    pair[0] = m.mean;
    pair[1] = m.m2;
  }
}

// Contiguous normalisation over the same parts.
template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(const T* x, O* out, const __grid_constant__ Arguments a,
                                                            const Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A mean, rstd;
  const GroupNormPlan& p = a.plan;
  const Part part(p);
  if (threadIdx.x < kWarp) {
    const Moments<A> m = join_splits(p, partial, part.n, part.index);
    if (threadIdx.x == 0) mean = m.mean, rstd = reciprocal_root(m.m2 / m.n, a.eps);
  }
  __syncthreads();
  const int64_t base = p.group_begin(part.n, part.index), first = part.index * p.width, end = p.piece_end(part.split);
  const float factor = code_factor(a);
#pragma unroll 2
  for (int64_t i = p.piece_begin(part.split) + int64_t(threadIdx.x) * V; i < end; i += kThreads * V) {
    const Affine<A> f = affine(a, part.n, first + channel_of(i, p.pixels), mean, rstd);
    const auto affine_of = [&](int) { return f; };
    store<V>(out + base + i, finish<O, V>(load<V>(x + base + i), affine_of, a.silu, factor));
  }
}

template <class T, class O, int V>
void run(const Tensor& x, const Tensor& out, const Arguments& a) {
  using A = Acc<T>;
  const GroupNormPlan& p = a.plan;
  const auto stream = static_cast<cudaStream_t>(current_stream(x));
  const T* from = static_cast<const T*>(x.const_data_ptr());
  O* to = static_cast<O*>(out.mutable_data_ptr());
  LDMFAST_CHECK(p.blocks() < (int64_t(1) << 31), "group_norm_silu: too many groups for one CUDA launch");
  const unsigned blocks = unsigned(p.blocks());
  if (p.one_pass) {
    const size_t bytes = size_t(p.width * p.pixels) * sizeof(T);
    const auto kernel = p.last ? one_pass_kernel<T, O, V, true> : one_pass_kernel<T, O, V, false>;
    kernel<<<blocks, kThreads, bytes, stream>>>(from, to, a);
  } else {
    constexpr ScalarType kind = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const std::vector<int64_t> size{p.batch, p.groups, p.splits, 2};
    const Tensor partial = torch::stable::new_empty(x, size, kind);
    A* pairs = static_cast<A*>(partial.mutable_data_ptr());
    (p.last ? stats_last_kernel<T, V> : stats_kernel<T, V>)<<<blocks, kThreads, 0, stream>>>(from, a, pairs);
    (p.last ? apply_last_kernel<T, O, V> : apply_kernel<T, O, V>)<<<blocks, kThreads, 0, stream>>>(from, to, a, pairs);
  }
  LDMFAST_CHECK(cudaGetLastError() == cudaSuccess, "group_norm_silu: a kernel did not start");
}

// codes: whether the result is uint8_t codes.
template <class T, bool codes>
void run(const Tensor& x, const Tensor& out, const Arguments& a) {
  using O = std::conditional_t<codes, uint8_t, T>;
  if constexpr (sizeof(T) < 8) {
    if (a.plan.vector > 1) return run<T, O, 16 / sizeof(T)>(x, out, a);
  }
  run<T, O, 1>(x, out, a);
}

// scale: null, or of the codes.
template <bool codes>
Tensor group_norm(const Tensor& x_, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool silu, const Tensor* scale) {
  const DeviceGuard guard(x_.get_device_index());
  const bool last = is_channels_last(x_);
  const Sizes sizes = sizes_of(x_);
  const Tensor x = last || x_.is_contiguous() ? x_ : torch::stable::contiguous(x_);
  const Sizes strides = strides_in(sizes, last ? channels_last(sizes.size()) : row_major(sizes.size()));
  const Tensor out = codes ? empty_strided(x, sizes, strides, aoti_torch_dtype_float8_e4m3fn())
                           : empty_strided(x, sizes, strides);
  if (out.numel() == 0) return out;
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr()) | reinterpret_cast<uintptr_t>(out.const_data_ptr());
  Arguments a;
  a.plan = group_norm_plan(sizes[0], sizes[1], x.numel() / (sizes[0] * sizes[1]), num_groups, last,
                           int64_t(x.element_size()), address % 16 == 0, processors);
  a.columns = row_loads(a.plan);
  a.shift = parameter(shift), a.weight = parameter(weight), a.bias = parameter(bias);
  a.eps = eps, a.silu = silu;
  a.code_scale = scale == nullptr ? nullptr : static_cast<const float*>(scale->const_data_ptr());
  switch (type_of(x)) {
    case Parameter::kBFloat16: run<__nv_bfloat16, codes>(x, out, a); break;
    case Parameter::kHalf: run<__half, codes>(x, out, a); break;
    case Parameter::kDouble: run<double, codes>(x, out, a); break;
    default: run<float, codes>(x, out, a);
  }
  return out;
}

}  // namespace
}  // namespace ldmfast::cuda
