// Sums of products: blocks of 32 positions and 32 outputs, by the tile unit or by vectors.
#pragma once

#include "stable.h"
#include "tile.h"

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

}  // namespace LDMFAST_LEVEL_NAMESPACE
