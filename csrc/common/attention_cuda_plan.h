// How attention is cut into CUDA blocks, and where each fragment, tile and descriptor finds its numbers. Plain
// arithmetic, no CUDA and no torch: tests/plan_check.cpp runs it on the host.
//
// Two kernels. `mma`: sm_80 and up, four warps, keys and values copied by the threads. `wgmma`: sm_90a, one warp group
// that copies (TMA) and two that compute. Both leave scores and results in registers in one pattern: lane l of a warp
// holds, of each 16 x 8 block, rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once

#include <cstdint>

#include "group_norm_plan.h"

namespace ldmfast {

// What a launch computes. Strides in elements; out is dense (batch, queries, heads, depth).
struct AttentionSizes {
  int64_t batch = 0, queries = 0, keys = 0, heads = 0, repeat = 1;  // repeat: query heads that share a key head
  bool causal = false;
  int64_t mask_block = 1;

  // How many keys query i sees; never falls as i grows. Past the last query: what the last one sees.
  LDMFAST_HOST_DEVICE int64_t visible(int64_t i) const {
    if (!causal) return keys;
    const int64_t at = (i < queries ? i : queries - 1) + keys - queries;
    if (at < 0) return 0;
    const int64_t end = (at / mask_block + 1) * mask_block;
    return end < keys ? end : keys;
  }
};

// Blocks of `rows` queries: which one has which, and the tiles of `tile_keys` keys that it walks.
struct AttentionBlock {
  int64_t batch, head, first;  // first query
  int tiles, full;             // tiles to walk; the first `full` of them need no mask
  int seen;                    // keys that any of its queries sees

  LDMFAST_HOST_DEVICE AttentionBlock(const AttentionSizes& a, uint32_t index, int rows, int tile_keys) {
    const int64_t blocks = ceil_divide(a.queries, rows);
    first = (blocks - 1 - index % blocks) * rows;  // under a causal mask the last queries have the most work
    head = index / blocks % a.heads;
    batch = index / blocks / a.heads;
    seen = int(a.visible(first + rows - 1));
    tiles = int(ceil_divide(seen, tile_keys));
    full = int(a.visible(first) / tile_keys);
  }
};
inline int64_t attention_blocks(const AttentionSizes& a, int rows) {
  return ceil_divide(a.queries, rows) * a.heads * a.batch;
}

// ---- mma.sync ---------------------------------------------------------------------------------------------------

// Operands of a matrix instruction come out of shared memory as 8 x 8 blocks (ldmatrix): lane l names row l % 8 of block
// l / 8. Which block is which, for the three operands; rows and chunks of 8 columns are counted within the operand.
struct FragmentPlace {
  int row, chunk;
};
LDMFAST_HOST_DEVICE inline FragmentPlace query_place(int lane) {  // 16 queries x 16: row halves first, then depth
  return {lane % 8 + lane / 8 % 2 * 8, lane / 16};
}
LDMFAST_HOST_DEVICE inline FragmentPlace key_place(int lane) {  // 16 keys x 16: depth first, then key halves
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}
LDMFAST_HOST_DEVICE inline FragmentPlace key_half_place(int lane) {  // 16 keys x 8: two blocks; lanes 16 to 31 repeat
  return {lane % 16, 0};
}
LDMFAST_HOST_DEVICE inline FragmentPlace value_place(int lane) {  // 16 keys x 16, transposed: key halves, then columns
  return {lane % 16, lane / 16};
}

template <int D>
struct MmaTile {
  static_assert(D % 8 == 0, "rows are copied 16 bytes at a time");
  static constexpr int depth = D, chunks = D / 8;
  static constexpr int steps = D / 16, half = D % 16 / 8;  // products of depth 16, then one of 8
  // An odd number of 16-byte chunks a row: any eight rows in a column of chunks lie in different banks.
  static constexpr int pitch = (chunks | 1) * 8;
  static constexpr int blocks = D <= 80 ? 2 : 1;  // of 16 queries a warp: two halve the traffic of shared memory, but
                                                  // 160 columns of results for two do not fit the registers
  static constexpr int keys = D == 80 ? 32 : D == 72 ? 48 : 64;  // of one tile; more spill on sm_80 or sm_100a
  static constexpr int warps = 4;                 // at most
  static constexpr int rows(int used_warps) { return used_warps * 16 * blocks; }
  static constexpr int shared_bytes(int used_warps) { return 2 * pitch * (rows(used_warps) + 4 * keys); }
};

// Warps of a block: fewer where more would leave over a quarter of the multiprocessors without a block, or only pad.
// Every row's arithmetic is the same whatever this gives.
inline int mma_warps(const AttentionSizes& a, int rows_of_warp, int most, int64_t processors) {
  int warps = most;
  while (warps > 1 && (4 * attention_blocks(a, warps * rows_of_warp) < 3 * processors ||
                       a.queries <= warps / 2 * rows_of_warp))
    warps /= 2;
  return warps;
}

// ---- wgmma ------------------------------------------------------------------------------------------------------

// A tile in shared memory is `panels` panels of [rows][64 elements]: 128 bytes a row, the 16-byte chunks of row r
// exchanged by XOR with r % 8, as TMA writes and wgmma reads under the 128-byte swizzle. Panels start on 1024 bytes.
constexpr int kPanel = 64;
LDMFAST_HOST_DEVICE constexpr int swizzled(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

template <int D>
struct WgmmaTile {
  static_assert(D % 8 == 0 && D <= 160, "columns come in eights; accumulators of 160 columns fill the registers");
  static constexpr int depth = D, panels = (D + kPanel - 1) / kPanel;
  static constexpr int steps = (D + 15) / 16;       // of depth 16; TMA fills what lies beyond D with zeros
  static constexpr int rows = 128, group_rows = 64;  // queries of a block and of one of its two warp groups
  static constexpr int keys = D <= 128 ? 128 : 80;   // 128 scores, half as many weights and 160 results a row: too many
  static constexpr int query_panel = rows * 128, key_panel = keys * 128;  // bytes
  static constexpr int query_bytes = panels * query_panel, key_bytes = panels * key_panel;
  static constexpr int stages = 2;
  static constexpr int barriers = query_bytes + 2 * stages * key_bytes;  // offset
  static constexpr int shared_bytes = barriers + 128 + 1024;             // 1024: to align the start

  // Byte offset, within a tile, of the 16-deep slice `step` of an operand whose depth runs along the rows.
  LDMFAST_HOST_DEVICE static constexpr int slice(int step, int panel_bytes) {
    return step / 4 * panel_bytes + step % 4 * 32;
  }
};
constexpr int kWgmmaThreads = 384, kConsumers = 2;

// Matrix descriptor of wgmma (PTX ISA, "Matrix Descriptor Format"): address, leading and stride offset, each in 16-byte
// units of 14 bits, and the 128-byte swizzle.
LDMFAST_HOST_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16 |
         uint64_t((stride & 0x3ffff) >> 4) << 32 | uint64_t(1) << 62;
}
// Rows along M or N, depth within a row (queries and keys in q k^T): groups of eight rows follow each other after 1024
// bytes; the leading offset has no meaning in a swizzled panel.
LDMFAST_HOST_DEVICE constexpr uint64_t rows_descriptor(uint32_t address) { return wgmma_descriptor(address, 16, 1024); }
// Depth along the rows, N within a row (values in p v): groups of eight rows after 1024 bytes, 64 columns after a panel.
LDMFAST_HOST_DEVICE constexpr uint64_t columns_descriptor(uint32_t address, uint32_t panel_bytes) {
  return wgmma_descriptor(address, panel_bytes, 1024);
}

// Buffer and parity of the n-th use of a ring of two barriers.
LDMFAST_HOST_DEVICE constexpr int ring_slot(int n) { return n % 2; }
LDMFAST_HOST_DEVICE constexpr uint32_t ring_parity(int n) { return uint32_t(n / 2 % 2); }

// What cuTensorMapEncodeTiled takes for a tensor (batch, tokens, heads, depth) whose last stride is 1: dimensions
// (depth, tokens, heads, batch), strides in bytes of the last three, a box of one panel.
struct TensorBox {
  uint64_t size[4], stride[3];
  uint32_t box[4];
};
inline TensorBox tensor_box(const int64_t* sizes, const int64_t* strides, int element_size, int rows) {
  TensorBox t{{uint64_t(sizes[3]), uint64_t(sizes[1]), uint64_t(sizes[2]), uint64_t(sizes[0])},
              {},
              {uint32_t(kPanel), uint32_t(rows), 1, 1}};
  const int order[3] = {1, 2, 0};
  for (int i = 0; i < 3; ++i)  // the stride of a dimension of size one is free and may be no multiple of 16
    t.stride[i] = uint64_t(sizes[order[i]] == 1 ? sizes[3] : strides[order[i]]) * uint64_t(element_size);
  return t;
}
// Its limits (CUDA driver API): sizes below 2^32, strides that are multiples of 16 below 2^40, and not 0 here.
inline bool fits_tensor_map(const TensorBox& t) {
  for (int i = 0; i < 4; ++i)
    if (t.size[i] == 0 || t.size[i] >> 32 != 0 || t.box[i] > 256) return false;
  for (int i = 0; i < 3; ++i)
    if (t.stride[i] == 0 || t.stride[i] % 16 != 0 || t.stride[i] >> 40 != 0) return false;
  return true;
}

}  // namespace ldmfast
