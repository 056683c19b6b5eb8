// Small matrix products on packed operands, C (m x n) = or += A (m x k) B (k x n), as fast as the level allows.
//
// A is row-major. B is packed in panels of adjacent columns, each whole in memory: in a panel that is w columns wide
// and starts at column n0, with group g, element (k, n) lies at n0 * k_total + [(k / g) * w + n - n0] * g + k % g, so
// that one vector load brings g values of k for each of its columns. C is fp32, row-major. m, n and k are padded by the
// caller to the engine's kRows, kColumns and kDepth. What C held is added last, so that a long sum over many calls
// rounds like a sum of blocks.
#pragma once

#include "vec.h"

namespace LDMFAST_LEVEL_NAMESPACE {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // vectors of C columns held in registers for each of kRows rows: 24 of 32 registers
#else
constexpr int kPanel = 2;  // 12 of 16 registers
#endif

// fp32 multiply-add, any level.
struct Fma {
  typedef float Element;
  static constexpr int kRows = 6, kColumns = kLanes<float>, kDepth = 1, kGroup = 1, kBlockRows = 48, kWide = kPanel;
  struct Scope {};

  template <int vectors>
  static void panel(const float* a, int lda, const float* b, float* c, int ldc, int m, int k, bool add) {
    constexpr int L = kLanes<float>, ldb = vectors * L;
    for (int i = 0; i < m; i += kRows, a += kRows * lda, c += kRows * ldc) {
      F sum[kRows][vectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = F{};
      for (int d = 0; d < k; ++d) {
        F column[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) column[v] = load(b + d * ldb + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const F x = splat(a[r * lda + d]);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[r][v] += x * column[v];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          float* to = c + r * ldc + v * L;
          store(to, add ? load(to) + sum[r][v] : sum[r][v]);
        }
    }
  }
  static void multiply(const float* a, int lda, const float* b, float* c, int ldc, int m, int n, int k, bool add);
};

#if defined(__AVX512BF16__)
// bf16 pairs with fp32 sums (VDPBF16PS).
struct Dot {
  typedef bf16 Element;
  static constexpr int kRows = 6, kColumns = 16, kDepth = 2, kGroup = 2, kBlockRows = 48, kWide = kPanel;
  struct Scope {};

  template <int vectors>
  static void panel(const bf16* a, int lda, const bf16* b, float* c, int ldc, int m, int k, bool add) {
    constexpr int ldb = vectors * 16;
    for (int i = 0; i < m; i += kRows, a += kRows * lda, c += kRows * ldc) {
      __m512 sum[kRows][vectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_ps();
      for (int d = 0; d < k; d += 2) {
        __m512bh column[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
          column[v] = (__m512bh)_mm512_loadu_si512((const void*)(b + d * ldb + v * 32));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int pair;
          std::memcpy(&pair, a + r * lda + d, 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, column[v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          float* to = c + r * ldc + v * 16;
          store(to, add ? load(to) + (F)sum[r][v] : (F)sum[r][v]);
        }
    }
  }
  static void multiply(const bf16* a, int lda, const bf16* b, float* c, int ldc, int m, int n, int k, bool add);
};
#endif

// Calls f(first column, width) for each panel of n columns; widths are equal, so that none is too narrow to hide
// the latency of its sums.
template <class Engine, class Fn>
inline void for_panels(int n, const Fn& f) {
  constexpr int L = Engine::kColumns, wide = Engine::kWide;
  for (int at = 0, left = n / L; left > 0;) {
    const int panels = (left + wide - 1) / wide, width = (left + panels - 1) / panels;
    f(at, width * L);
    at += width * L;
    left -= width;
  }
}

template <class Engine>
inline void by_panels(const typename Engine::Element* a, int lda, const typename Engine::Element* b, float* c, int ldc,
                      int m, int n, int k, bool add) {
  for_panels<Engine>(n, [&](int at, int width) {
    const auto* panel = b + at * k;
    float* to = c + at;
    switch (width / Engine::kColumns) {
      case 1: return Engine::template panel<1>(a, lda, panel, to, ldc, m, k, add);
      case 2: return Engine::template panel<2>(a, lda, panel, to, ldc, m, k, add);
      case 3: return Engine::template panel<kPanel < 3 ? 1 : 3>(a, lda, panel, to, ldc, m, k, add);
      default: return Engine::template panel<kPanel < 4 ? 1 : 4>(a, lda, panel, to, ldc, m, k, add);
    }
  });
}

inline void Fma::multiply(const float* a, int lda, const float* b, float* c, int ldc, int m, int n, int k, bool add) {
  by_panels<Fma>(a, lda, b, c, ldc, m, n, k, add);
}
#if defined(__AVX512BF16__)
inline void Dot::multiply(const bf16* a, int lda, const bf16* b, float* c, int ldc, int m, int n, int k, bool add) {
  by_panels<Dot>(a, lda, b, c, ldc, m, n, k, add);
}
#endif

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// bf16 tiles of 16 rows by 64 bytes (TDPBF16PS): two by two tiles of C, two of A, two of B.
struct Amx {
  typedef bf16 Element;
  static constexpr int kRows = 32, kColumns = 16, kDepth = 32, kGroup = 2, kBlockRows = 64, kWide = 2;

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

  template <bool two_columns>
  static void block(const bf16* a, int lda, const bf16* b, float* c, int ldc, int k, bool add) {
    constexpr int ldb = two_columns ? 32 : 16, b_bytes = ldb * 4;
    const int c_bytes = ldc * 4, a_bytes = lda * 2;
    if (add) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16 * ldc, c_bytes);
      if (two_columns) {
        _tile_loadd(2, c + 16, c_bytes);
        _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int d = 0; d < k; d += 32) {
      _tile_loadd(4, a + d, a_bytes);
      _tile_loadd(5, a + 16 * lda + d, a_bytes);
      _tile_loadd(6, b + d * ldb, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (two_columns) {
        _tile_loadd(7, b + d * ldb + 32, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16 * ldc, c_bytes);
    if (two_columns) {
      _tile_stored(2, c + 16, c_bytes);
      _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    }
  }

  static void multiply(const bf16* a, int lda, const bf16* b, float* c, int ldc, int m, int n, int k, bool add) {
    for_panels<Amx>(n, [&](int at, int width) {
      for (int i = 0; i < m; i += 32)
        (width == 32 ? block<true> : block<false>)(a + i * lda, lda, b + at * k, c + i * ldc + at, ldc, k, add);
    });
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
