// attention by mma.sync, sm_80 and up: a block has up to 128 queries of one head and walks the keys in tiles of up to 64, the
// next tile on its way while this one is used. Depths that are no multiple of 16 end in a product of depth 8, so that 40
// is 16 + 16 + 8 and not 64.
#pragma once

#include "cuda/attention_softmax.cuh"

namespace ldmfast::cuda {

// `rows` rows of D elements, 16 bytes a thread; zeros from row `valid` on.
template <int D, class T>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int rows, int64_t valid) {
  using Tile = MmaTile<D>;
  for (int i = threadIdx.x; i < rows * Tile::chunks; i += blockDim.x) {
    const int row = i / Tile::chunks, chunk = i % Tile::chunks;
    const bool there = row < valid;
    ptx::copy_async(to + row * Tile::pitch + chunk * 8, from + (there ? row * stride : 0) + chunk * 8, there);
  }
}

template <class T, int D>
struct MmaQueries {
  using Tile = MmaTile<D>;
  uint32_t whole[Tile::blocks][Tile::steps][4];
  uint32_t half[Tile::blocks][2];

  __device__ __forceinline__ void load(const T* tile, int lane) {  // tile: this warp's rows
#pragma unroll
    for (int m = 0; m < Tile::blocks; ++m) {
      const FragmentPlace at = query_place(lane);
      const T* row = tile + (16 * m + at.row) * Tile::pitch;
#pragma unroll
      for (int d = 0; d < Tile::steps; ++d) ptx::load_blocks(whole[m][d], row + (2 * d + at.chunk) * 8);
      if constexpr (Tile::half) ptx::load_blocks(half[m], tile + (16 * m + lane % 16) * Tile::pitch + 16 * Tile::steps);
    }
  }
};

// One tile of keys. `first`: its first key; `seen`: keys that the block sees; limit: keys that this lane's rows see.
template <bool masked, class T, int D>
__device__ __forceinline__ void mma_tile(const MmaQueries<T, D>& q, const T* k, const T* v, int first, int seen,
                                         const int (&limit)[MmaTile<D>::blocks][2], float unit,
                                         RowState (&state)[MmaTile<D>::blocks],
                                         float (&out)[MmaTile<D>::blocks][D / 8][4]) {
  using Tile = MmaTile<D>;
  const int lane = threadIdx.x % 32;
  float score[Tile::blocks][Tile::keys / 8][4] = {};
  const FragmentPlace key = key_place(lane), key_half = key_half_place(lane), value = value_place(lane);
#pragma unroll
  for (int i = 0; i < Tile::keys / 16; ++i) {
    if (masked && first + 16 * i >= seen) break;
    const T* row = k + (16 * i + key.row) * Tile::pitch + key.chunk * 8;
#pragma unroll
    for (int d = 0; d < Tile::steps; ++d) {
      uint32_t b[4];
      ptx::load_blocks(b, row + 16 * d);
#pragma unroll
      for (int m = 0; m < Tile::blocks; ++m) {
        ptx::mma<T>(score[m][2 * i], q.whole[m][d], b[0], b[1]);
        ptx::mma<T>(score[m][2 * i + 1], q.whole[m][d], b[2], b[3]);
      }
    }
    if constexpr (Tile::half) {
      uint32_t b[2];
      ptx::load_blocks(b, k + (16 * i + key_half.row) * Tile::pitch + 16 * Tile::steps);
#pragma unroll
      for (int m = 0; m < Tile::blocks; ++m) {
        ptx::mma<T>(score[m][2 * i], q.half[m], b[0]);
        ptx::mma<T>(score[m][2 * i + 1], q.half[m], b[1]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::blocks; ++m) {
    const int left[2] = {limit[m][0] - first, limit[m][1] - first};
    weigh<masked>(score[m], state[m], unit, left);
    rescale(out[m], state[m]);
  }
#pragma unroll
  for (int i = 0; i < Tile::keys / 16; ++i) {
    if (masked && first + 16 * i >= seen) break;
    uint32_t a[Tile::blocks][4];
#pragma unroll
    for (int m = 0; m < Tile::blocks; ++m) pack_weights<T>(a[m], score[m][2 * i], score[m][2 * i + 1]);
    const T* row = v + (16 * i + value.row) * Tile::pitch;
#pragma unroll
    for (int j = 0; j + 1 < Tile::chunks; j += 2) {
      uint32_t b[4];
      ptx::load_transposed(b, row + (j + value.chunk) * 8);
#pragma unroll
      for (int m = 0; m < Tile::blocks; ++m) {
        ptx::mma<T>(out[m][j], a[m], b[0], b[1]);
        ptx::mma<T>(out[m][j + 1], a[m], b[2], b[3]);
      }
    }
    if constexpr (Tile::chunks % 2 == 1) {
      uint32_t b[2];
      ptx::load_transposed(b, row + (Tile::chunks - 1) * 8);
#pragma unroll
      for (int m = 0; m < Tile::blocks; ++m) ptx::mma<T>(out[m][Tile::chunks - 1], a[m], b[0], b[1]);
    }
  }
}

// Results of a warp's rows through its own part of shared memory, so that they leave 16 bytes a lane.
template <class T, int D>
__device__ __forceinline__ void store_rows(const AttentionArguments& a, const AttentionBlock& at, T* tile, int64_t first,
                                           const RowState (&state)[MmaTile<D>::blocks],
                                           const float (&out)[MmaTile<D>::blocks][D / 8][4]) {
  using Tile = MmaTile<D>;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the warp's queries, which lay here, are in registers
#pragma unroll
  for (int m = 0; m < Tile::blocks; ++m) {
    float inverse[2];
    inverse_totals(state[m], inverse);
#pragma unroll
    for (int j = 0; j < Tile::chunks; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T* to = tile + (16 * m + 8 * r + lane / 4) * Tile::pitch + 8 * j + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = ptx::pack<T>(out[m][j][2 * r] * inverse[r], out[m][j][2 * r + 1] * inverse[r]);
      }
  }
  __syncwarp();
  for (int i = lane; i < 16 * Tile::blocks * Tile::chunks; i += 32) {
    const int row = i / Tile::chunks, chunk = i % Tile::chunks;
    if (first + row < a.sizes.queries)
      ptx::store(result_row<T>(a, at, first + row, D) + chunk * 8,
                 *reinterpret_cast<const uint4*>(tile + row * Tile::pitch + chunk * 8));
  }
}

// q: (batch, queries, heads, D); k, v: (batch, keys, heads / repeat, D), last strides 1, rows on 16 bytes.
template <class T, int D>
__global__ void __launch_bounds__(MmaTile<D>::warps * 32, 2)
    mma_kernel(const __grid_constant__ AttentionArguments a) {
  using Tile = MmaTile<D>;
  const int rows = Tile::rows(int(blockDim.x) / 32), warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const AttentionBlock at(a.sizes, blockIdx.x, rows, Tile::keys);
  T* const q_tile = reinterpret_cast<T*>(ptx::shared_memory());
  T* const k_tile = q_tile + rows * Tile::pitch;
  T* const v_tile = k_tile + 2 * Tile::keys * Tile::pitch;
  const int64_t kv_head = at.head / a.sizes.repeat;
  const T* q = static_cast<const T*>(a.q) + at.batch * a.q_stride[0] + at.first * a.q_stride[1] + at.head * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + at.batch * a.k_stride[0] + kv_head * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + at.batch * a.v_stride[0] + kv_head * a.v_stride[2];
  const auto copy_tile = [&](int tile) {
    const int64_t first = int64_t(tile) * Tile::keys;
    const int to = tile % 2 * Tile::keys * Tile::pitch;
    copy_rows<D>(k_tile + to, k + first * a.k_stride[1], a.k_stride[1], Tile::keys, a.sizes.keys - first);
    copy_rows<D>(v_tile + to, v + first * a.v_stride[1], a.v_stride[1], Tile::keys, a.sizes.keys - first);
  };
  float out[Tile::blocks][D / 8][4] = {};
  RowState state[Tile::blocks];
  int limit[Tile::blocks][2];
  T* const own_rows = q_tile + warp * 16 * Tile::blocks * Tile::pitch;
  const int64_t own_first = at.first + warp * 16 * Tile::blocks;
#pragma unroll
  for (int m = 0; m < Tile::blocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) limit[m][r] = int(a.sizes.visible(own_first + 16 * m + 8 * r + lane / 4));
  MmaQueries<T, D> queries;
  if (at.tiles > 0) {
    copy_rows<D>(q_tile, q, a.q_stride[1], rows, a.sizes.queries - at.first);
    copy_tile(0);
  }
  for (int tile = 0; tile < at.tiles; ++tile) {
    ptx::wait_copies();
    __syncthreads();  // every thread's part of this tile is there, and the tile before it has been used
    if (tile == 0) queries.load(own_rows, lane);
    if (tile + 1 < at.tiles) copy_tile(tile + 1);
    const int from = tile % 2 * Tile::keys * Tile::pitch, first = tile * Tile::keys;
    if (tile < at.full)
      mma_tile<false, T, D>(queries, k_tile + from, v_tile + from, first, at.seen, limit, a.unit, state, out);
    else
      mma_tile<true, T, D>(queries, k_tile + from, v_tile + from, first, at.seen, limit, a.unit, state, out);
  }
  store_rows<T, D>(a, at, own_rows, own_first, state, out);
}

}  // namespace ldmfast::cuda
