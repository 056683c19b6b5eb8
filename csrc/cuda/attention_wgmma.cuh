// attention by wgmma, sm_90a: one warp group copies tiles (TMA), two compute, 64 queries each, in turns: while one
// issues its products, the other has the multipliers idle and makes weights of its scores. Within a group the scores of
// tile t are made while the weights of tile t - 1 meet their values (Shah et al. 2024, sections 3.1 and 3.2).
//
// Barriers: `*_full` are over when a tile's bytes are there, `*_free` when all eight computing warps are done with it.
#pragma once

#include "cuda/attention_softmax.cuh"

namespace ldmfast::cuda {

struct WgmmaBarriers {
  uint64_t q_full, k_full[2], v_full[2], k_free[2], v_free[2];
};
constexpr int kTurn = 1;        // named barriers kTurn and kTurn + 1: whose turn it is to issue products
constexpr int kGroupDone = 3;   // and kGroupDone + 1: within one group
constexpr int kConsumerThreads = 256;

#ifdef LDMFAST_WGMMA

template <class Tile>
__device__ __forceinline__ void copy_panels(const CUtensorMap& map, uint64_t* full, unsigned char* to, int panel_bytes,
                                            int token, int head, int batch) {
  ptx::barrier_expect(full, uint32_t(Tile::panels * panel_bytes));
#pragma unroll
  for (int p = 0; p < Tile::panels; ++p)
    ptx::copy_box(map, full, to + p * panel_bytes, p * kPanel, token, head, batch);
}

// One thread: queries once, then keys and values tile by tile as their places become free.
template <class Tile>
__device__ __forceinline__ void produce(const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
                                        const AttentionBlock& at, int kv_head, unsigned char* tiles,
                                        WgmmaBarriers& barriers) {
  const int batch = int(at.batch);
  unsigned char* const keys = tiles + Tile::query_bytes;
  unsigned char* const values = keys + Tile::stages * Tile::key_bytes;
  if (at.tiles > 0) copy_panels<Tile>(q, &barriers.q_full, tiles, Tile::query_panel, int(at.first), int(at.head), batch);
  for (int t = 0; t < at.tiles; ++t) {
    const int slot = ring_slot(t);
    const uint32_t before = ring_parity(t) ^ 1;  // the use before this one
    ptx::barrier_wait(&barriers.k_free[slot], before);
    copy_panels<Tile>(k, &barriers.k_full[slot], keys + slot * Tile::key_bytes, Tile::key_panel, t * Tile::keys, kv_head,
                      batch);
    ptx::barrier_wait(&barriers.v_free[slot], before);
    copy_panels<Tile>(v, &barriers.v_full[slot], values + slot * Tile::key_bytes, Tile::key_panel, t * Tile::keys,
                      kv_head, batch);
  }
}

template <class T, int D>
struct WgmmaConsumer {
  using Tile = WgmmaTile<D>;
  static constexpr int kScores = Tile::keys / 8, kWeights = Tile::keys / 16;

  const AttentionArguments& a;
  const AttentionBlock& at;
  WgmmaBarriers& barriers;
  int group;  // 0 or 1
  uint32_t q, k, v;  // addresses: this group's queries, the rings
  int limit[2];
  RowState state;
  float score[kScores][4], out[D / 8][4];
  uint32_t weight[kWeights][4];

  __device__ __forceinline__ void begin_turn() { ptx::named_sync<kConsumerThreads>(kTurn + group); }
  // Each group waits for tiles + 1 turns; the last of group 1 has no one to hand over to.
  __device__ __forceinline__ void end_turn(bool last) {
    if (!(last && group == 1)) ptx::named_arrive<kConsumerThreads>(kTurn + 1 - group);
  }
  __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  }

  // Issues scores = q k^T of tile t.
  __device__ __forceinline__ void issue_scores(int t) {
    ptx::barrier_wait(&barriers.k_full[ring_slot(t)], ring_parity(t));
    const uint32_t keys = k + ring_slot(t) * Tile::key_bytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < Tile::steps; ++d)
      ptx::wgmma<T>(score, rows_descriptor(q + Tile::slice(d, Tile::query_panel)),
                    rows_descriptor(keys + Tile::slice(d, Tile::key_panel)), d > 0);
    ptx::wgmma_commit();
  }
  // Issues out += weights v of tile t.
  __device__ __forceinline__ void issue_results(int t) {
    ptx::barrier_wait(&barriers.v_full[ring_slot(t)], ring_parity(t));
    const uint32_t values = v + ring_slot(t) * Tile::key_bytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kWeights; ++i)
      ptx::wgmma<T>(out, weight[i], columns_descriptor(values + i * 16 * 128, Tile::key_panel));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void weigh_tile(int t) {
    const int first = t * Tile::keys, left[2] = {limit[0] - first, limit[1] - first};
    if (t < at.full) weigh<false>(score, state, a.unit, left);
    else weigh<true>(score, state, a.unit, left);
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) pack_weights<T>(weight[i], score[2 * i], score[2 * i + 1]);
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0;
    if (at.tiles == 0) return;
    if (group == 1) end_turn(false);  // the first turn is group 0's
    ptx::barrier_wait(&barriers.q_full, 0);
    begin_turn();
    issue_scores(0);
    end_turn(false);
    ptx::wgmma_wait<0>();
    ptx::hold(score);
    release(&barriers.k_free[0]);
    weigh_tile(0);
    pack();
    for (int t = 1; t < at.tiles; ++t) {
      begin_turn();
      issue_scores(t);
      issue_results(t - 1);
      end_turn(false);
      ptx::wgmma_wait<1>();
      ptx::hold(score);
      release(&barriers.k_free[ring_slot(t)]);
      weigh_tile(t);
      ptx::wgmma_wait<0>();
      ptx::hold(out);
      ptx::hold(weight);
      release(&barriers.v_free[ring_slot(t - 1)]);
      rescale(out, state);
      pack();
    }
    begin_turn();
    issue_results(at.tiles - 1);
    end_turn(true);
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(weight);
  }

  // Results through the group's part of the queries' tile, in its swizzle, so that they leave 16 bytes a lane.
  __device__ __forceinline__ void store(unsigned char* tiles) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    unsigned char* const tile = tiles + (group * Tile::group_rows + warp * 16) * 128;  // this warp's rows of panel 0
    const int64_t first = at.first + group * Tile::group_rows + warp * 16;
    float inverse[2];
    inverse_totals(state, inverse);
    ptx::named_sync<128>(kGroupDone + group);  // no warp of the group reads queries any more
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        unsigned char* to = tile + j / 8 * Tile::query_panel + swizzled(8 * r + lane / 4, j % 8) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = ptx::pack<T>(out[j][2 * r] * inverse[r], out[j][2 * r + 1] * inverse[r]);
      }
    __syncwarp();
    for (int i = lane; i < 16 * (D / 8); i += 32) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      if (first + row < a.sizes.queries)
        ptx::store(result_row<T>(a, at, first + row, D) + chunk * 8,
                   *reinterpret_cast<const uint4*>(tile + chunk / 8 * Tile::query_panel + swizzled(row, chunk % 8)));
    }
  }
};

#endif  // LDMFAST_WGMMA

// Maps: q in boxes of 128 queries, k and v in boxes of one tile of keys (csrc/common/attention_cuda_plan.h).
template <class T, int D>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                 const __grid_constant__ CUtensorMap v, const __grid_constant__ AttentionArguments a) {
#ifdef LDMFAST_WGMMA
  using Tile = WgmmaTile<D>;
  unsigned char* const memory = ptx::shared_memory();
  unsigned char* const tiles = memory + (1024 - ptx::address(memory) % 1024) % 1024;
  WgmmaBarriers& barriers = *reinterpret_cast<WgmmaBarriers*>(tiles + Tile::barriers);
  const AttentionBlock at(a.sizes, blockIdx.x, Tile::rows, Tile::keys);
  if (threadIdx.x == 0) {
    ptx::barrier_init(&barriers.q_full, 1);
    for (int s = 0; s < 2; ++s) {
      ptx::barrier_init(&barriers.k_full[s], 1);
      ptx::barrier_init(&barriers.v_full[s], 1);
      ptx::barrier_init(&barriers.k_free[s], kConsumerThreads / 32);
      ptx::barrier_init(&barriers.v_free[s], kConsumerThreads / 32);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  // 24 registers for a group that copies, 240 for two that compute: 64512 of 65536, as 168 for each of 384 threads
  if (threadIdx.x < 128) {
    ptx::fewer_registers<24>();
    if (threadIdx.x == 0) produce<Tile>(q, k, v, at, int(at.head / a.sizes.repeat), tiles, barriers);
  } else {
    ptx::more_registers<240>();
    const int group = int(threadIdx.x) / 128 - 1;
    const uint32_t start = ptx::address(tiles), keys = start + Tile::query_bytes;
    WgmmaConsumer<T, D> consumer{a, at, barriers, group, start + group * Tile::group_rows * 128, keys,
                                 keys + Tile::stages * Tile::key_bytes, {}, {}, {}, {}, {}};
    const int row = group * Tile::group_rows + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4;
    for (int r = 0; r < 2; ++r) consumer.limit[r] = int(a.sizes.visible(at.first + row + 8 * r));
    consumer.run();
    consumer.store(tiles);
  }
#endif
}

}  // namespace ldmfast::cuda
