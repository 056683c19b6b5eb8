// Small matrix products, C (m x n) = or += A (m x k) B (k x n), as fast as the level allows. The n columns are one
// engine's `kColumns`, so that a column is a lane of some vector in everything done between two products.
//
// B is packed: element (k, n) lies at [(k / kGroup) * kColumns + n] * kGroup + k % kGroup, so that one vector load
// brings kGroup values of k for each of its columns. A is read where it lies: kGroup values of k are adjacent, the next
// row and the next group are `row` and `group` elements further (tiles need group == kGroup). C is fp32, row-major.
// k is a multiple of kDepth, m of kRows. What C held is added last: a long sum then rounds like a sum of blocks.
#pragma once

#include "vec.h"

namespace LDMFAST_LEVEL_NAMESPACE {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // vectors of C columns held in registers for each of six rows: 24 of 32 registers
#else
constexpr int kPanel = 2;  // 12 of 16 registers
#endif

// The dword that vector `v` at element `at` of B holds for each column, times the broadcast A.
struct FmaStep {
  typedef float Element;
  static F load_columns(const float* b) { return load(b); }
  static F splat_row(const float* a) { return splat(*a); }
  static F step(F sum, F x, F column) { return sum + x * column; }
};
#if defined(__AVX512BF16__)
struct DotStep {
  typedef bf16 Element;
  static __m512i load_columns(const bf16* b) { return _mm512_loadu_si512((const void*)b); }
  static __m512i splat_row(const bf16* a) {
    int pair;
    std::memcpy(&pair, static_cast<const void*>(a), 4);
    return _mm512_set1_epi32(pair);
  }
  static F step(F sum, __m512i x, __m512i column) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)column);
  }
};
#endif

// Vector engines: up to six rows by kPanel vectors of sums in registers.
template <class Step, int group_size>
struct Vectors {
  typedef typename Step::Element Element;
  static constexpr int kGroup = group_size, kDepth = group_size, kRows = 1, kColumns = kPanel * kLanes<float>;
  static constexpr bool kTiles = false;
  struct Scope {};

  template <int rows>
  static void block(const Element* a, int64_t row, int64_t group, const Element* b, float* c, int k, bool add) {
    constexpr int L = kLanes<float>;
    F sum[rows][kPanel];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanel; ++v) sum[r][v] = F{};
    for (int d = 0; d < k; d += kGroup, a += group, b += kColumns * kGroup) {
      decltype(Step::load_columns(b)) column[kPanel];
#pragma GCC unroll 4
      for (int v = 0; v < kPanel; ++v) column[v] = Step::load_columns(b + v * L * kGroup);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto x = Step::splat_row(a + r * row);
#pragma GCC unroll 4
        for (int v = 0; v < kPanel; ++v) sum[r][v] = Step::step(sum[r][v], x, column[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanel; ++v) {
        float* to = c + r * kColumns + v * L;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
  }

  static void multiply(const Element* a, int64_t row, int64_t group, const Element* b, float* c, int m, int k,
                       bool add) {
    for (int blocks = (m + 5) / 6; blocks > 0; --blocks) {  // equal blocks: a short one does not hide its latency
      const int rows = (m + blocks - 1) / blocks;
      switch (rows) {
        case 1: block<1>(a, row, group, b, c, k, add); break;
        case 2: block<2>(a, row, group, b, c, k, add); break;
        case 3: block<3>(a, row, group, b, c, k, add); break;
        case 4: block<4>(a, row, group, b, c, k, add); break;
        case 5: block<5>(a, row, group, b, c, k, add); break;
        default: block<6>(a, row, group, b, c, k, add); break;
      }
      m -= rows;
      a += rows * row;
      c += rows * kColumns;
    }
  }
};

typedef Vectors<FmaStep, 1> Fma;  // fp32 multiply-add, any level
#if defined(__AVX512BF16__)
typedef Vectors<DotStep, 2> Dot;  // bf16 pairs with fp32 sums (VDPBF16PS)
#endif

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// bf16 tiles of 16 rows by 64 bytes with fp32 sums (TDPBF16PS).
struct Amx {
  typedef bf16 Element;
  static constexpr int kGroup = 2, kDepth = 32, kRows = 16, kColumns = 32;
  static constexpr bool kTiles = true;

  struct Scope {  // tile shapes belong to the thread
    Scope() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

  // As assembly, because the compilers' intrinsics do not say that a tile load reads memory.
  template <int t>
  static void load_tile(const void* from, int64_t bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(t) : "memory");
  }
  template <int t>
  static void store_tile(void* to, int64_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int t>
  static void begin(const float* c, bool add) {
    if (add)
      load_tile<t>(c, kColumns * 4);
    else
      asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }

  static constexpr int64_t kBytes = kColumns * 4;           // of a row of C, or of a group of B
  static constexpr int64_t kStepB = 16 * kColumns * 2;      // elements of B from one tile to the next in k

  // k = 32 * steps, steps <= 2: B stays in tiles 4 to 7; a tile of C is stored while the next one is summed, not before:
  // a store waits for its sum, and much waits behind it.
  template <int steps>
  static void short_sums(const bf16* a, int64_t row, const bf16* b, float* c, int m, bool add) {
    load_tile<4>(b, kBytes);
    load_tile<6>(b + 32, kBytes);
    if (steps > 1) {
      load_tile<5>(b + kStepB, kBytes);
      load_tile<7>(b + kStepB + 32, kBytes);
    }
    for (int i = 0; i < m; i += 16, a += 16 * row, c += 16 * kColumns) {
      load_tile<2>(a, 64);
      if (steps > 1) load_tile<3>(a + 512, 64);
      begin<0>(c, add);
      dot<0, 2, 4>();
      if (steps > 1) dot<0, 3, 5>();
      if (i > 0) store_tile<1>(c - 16 * kColumns + 16, kBytes);
      begin<1>(c + 16, add);
      dot<1, 2, 6>();
      if (steps > 1) dot<1, 3, 7>();
      store_tile<0>(c, kBytes);
    }
    store_tile<1>(c - 16 * kColumns + 16, kBytes);
  }

  static void long_sums(const bf16* a, int64_t row, const bf16* b, float* c, int m, int k, bool add) {
    for (int i = 0; i < m; i += 16, a += 16 * row, c += 16 * kColumns) {
      begin<0>(c, add);
      begin<1>(c + 16, add);
      const bf16* column = b;
      for (int d = 0; d < k; d += 32, column += kStepB) {
        load_tile<2>(a + d * 16, 64);
        load_tile<4>(column, kBytes);
        dot<0, 2, 4>();
        load_tile<5>(column + 32, kBytes);
        dot<1, 2, 5>();
      }
      store_tile<0>(c, kBytes);
      store_tile<1>(c + 16, kBytes);
    }
  }

  static void multiply(const bf16* a, int64_t row, int64_t, const bf16* b, float* c, int m, int k, bool add) {
    if (k == 32) return short_sums<1>(a, row, b, c, m, add);
    if (k == 64) return short_sums<2>(a, row, b, c, m, add);
    long_sums(a, row, b, c, m, k, add);
  }
};
#endif

// What multiplies bf16 at this level.
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
typedef Amx Bf16Engine;
#elif defined(__AVX512BF16__)
typedef Dot Bf16Engine;
#else
typedef Fma Bf16Engine;
#endif

}  // namespace LDMFAST_LEVEL_NAMESPACE
