// uint8 codes of a whole tensor, value = (code - zero point) * scale: range, scale, rounding, and the border of an
// image that a convolution without padding can read.
#pragma once

#include <algorithm>
#include <mutex>
#include <tuple>

#include "dispatch.h"
#include "pairs.h"

namespace LDMFAST_LEVEL_NAMESPACE {

typedef std::tuple<Tensor, Tensor, Tensor> Codes;  // codes (uint8), scale (fp32, one), zero point (int32, one)

// What a tensor spans, zero included. One value that is NaN or infinite spoils it.
struct Range {
  double lo = 0, hi = 0;
  bool finite = true;
  void add(double y) {
    lo = y < lo ? y : lo;
    hi = y > hi ? y : hi;
    finite = finite && std::isfinite(y);
  }
  void join(const Range& other) {
    lo = std::min(lo, other.lo);
    hi = std::max(hi, other.hi);
    finite = finite && other.finite;
  }
};

inline F min(F a, F b) {  // b where either is NaN
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline D min(D a, D b) { return a < b ? a : b; }
inline D max(D a, D b) { return a > b ? a : b; }

template <class A>
struct Lanes {  // a range, lane by lane
  Vector<A> lo{}, hi{}, spoilt{};
  void add(Vector<A> y) {
    lo = min(lo, y);
    hi = max(hi, y);
    spoilt += y * 0;
  }
  void join(const Lanes& other) {
    lo = min(lo, other.lo);
    hi = max(hi, other.hi);
    spoilt += other.spoilt;
  }
  Range range() const {
    Range all;
    for (int i = 0; i < kLanes<A>; ++i) {
      all.add(double(lo[i]));
      all.add(double(hi[i]));
      all.finite = all.finite && spoilt[i] == 0;
    }
    return all;
  }
};

// The joint range of f(begin, end) over parts of [0, n). Minimum and maximum do not depend on the split.
template <class Fn>
inline Range parallel_range(int64_t n, int64_t grain, const Fn& f) {
  Range all;
  std::mutex mutex;
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const Range part = f(begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    all.join(part);
  });
  return all;
}

// What maps values to codes: code = round(y * inverse + zero), cut to 0..255. A range that is not finite has scale
// NaN and codes 0, so that whatever is made of it is NaN too.
template <class A>
struct Coder {
  A inverse = 0, zero = 0;
  float scale = std::numeric_limits<float>::quiet_NaN();
  int32_t zero_point = 0;

  explicit Coder(const Range& range) {
    const double span = range.hi - range.lo;
    if (!range.finite || !std::isfinite(float(span / 255))) return;
    scale = span == 0 ? 1 : std::max(float(span / 255), std::numeric_limits<float>::min());
    zero_point = int32_t(std::nearbyint(-range.lo / double(scale)));
    inverse = A(1 / double(scale));
    zero = A(zero_point);
  }
  Vector<A> operator()(Vector<A> y) const { return y * inverse + zero; }
};

// Whole numbers nearest to v, cut to 0..255 (NaN becomes 0).
inline void store_codes(uint8_t* q, F v) {
#if defined(__AVX512F__)
  const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps((__m512)v, _mm512_setzero_ps()));
  _mm_storeu_si128((__m128i*)q, _mm512_cvtusepi32_epi8(whole));
#elif defined(__AVX2__)
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps((__m256)v, _mm256_setzero_ps()),
                                                         _mm256_set1_ps(255)));
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)q, _mm_packus_epi16(half, half));
#else
  I whole;
  nearest(v > 0 ? (v < 255 ? v : splat(255.0f)) : F{}, whole);
  for (int i = 0; i < kLanes<float>; ++i) q[i] = uint8_t(whole[i]);
#endif
}
inline void store_codes(uint8_t* q, D v) {
  for (int i = 0; i < kLanes<double>; ++i)
    q[i] = uint8_t(std::nearbyint(v[i] > 0 ? (v[i] < 255 ? v[i] : 255.0) : 0.0));
}
// The codes of two pairs of T, 4 vectors. Narrowing saturates, so only what no int32 holds would need cutting first.
template <class T, class V>
inline void store_codes(uint8_t* q, V a, V b, V c, V d) {
  constexpr int L = int(sizeof(V) / sizeof(a[0]));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, F>) {
    const auto whole = [](F v) { return _mm512_cvtps_epi32((__m512)v); };
    const __m512i low = _mm512_packs_epi32(whole(a), whole(b)), high = _mm512_packs_epi32(whole(c), whole(d));
    __m512i bytes = _mm512_packus_epi16(low, high);  // in each quarter 4 of a, of b, of c and of d
    if constexpr (kInterleaved<T>) {
      const __m512i zip = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
      bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_shuffle_epi8(bytes, zip));
    } else {
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      bytes = _mm512_permutexvar_epi32(order, bytes);
    }
    return _mm512_storeu_si512(q, bytes);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, F>) {
    const auto whole = [](F v) { return _mm256_cvtps_epi32((__m256)v); };
    const __m256i low = _mm256_packs_epi32(whole(a), whole(b)), high = _mm256_packs_epi32(whole(c), whole(d));
    __m256i bytes = _mm256_packus_epi16(low, high);  // in each half 4 of a, of b, of c and of d
    if constexpr (kInterleaved<T>) {
      const __m256i zip = _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7,
                                           8, 12, 9, 13, 10, 14, 11, 15);
      bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, zip), 0xd8);
    } else {
      bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    return _mm256_storeu_si256((__m256i*)q, bytes);
  }
#endif
  uint8_t ordered[4 * L];
  store_codes(ordered, a);
  store_codes(ordered + L, b);
  store_codes(ordered + 2 * L, c);
  store_codes(ordered + 3 * L, d);
  for (int i = 0; i < 4 * L; ++i) q[i] = ordered[i / kPair<T> * kPair<T> + slot<T>(i % kPair<T>, kPair<T>)];
}
// The codes of one pair.
template <class T, class V>
inline void store_codes(uint8_t* q, V a, V b) {
  uint8_t buffer[2 * kPair<T>];
  store_codes<T>(buffer, a, b, V{}, V{});
  std::memcpy(q, buffer, size_t(kPair<T>));
}
template <class V>
inline void store_codes(uint8_t* q, V v, int n) {
  uint8_t buffer[sizeof(V) / sizeof(v[0])];
  store_codes(buffer, v);
  std::memcpy(q, buffer, size_t(n));
}

// Where the pixels of a channels-last image with a border are. Without a border any run of pixels is an image.
struct Image {
  int64_t n = 1, c = 1, h = 1, w = 1, pad = 0;

  int64_t line() const { return (w + 2 * pad) * c; }
  // First code of pixel p of picture i.
  int64_t at(int64_t i, int64_t p) const {
    return pad == 0 ? (i * h * w + p) * c : (i * (h + 2 * pad) + p / w + pad) * line() + (p % w + pad) * c;
  }
  // How many of `count` pixels from p on are adjacent.
  int64_t run(int64_t p, int64_t count) const { return pad == 0 ? count : std::min(count, w - p % w); }

  void fill_border(uint8_t* q, int32_t value) const {
    if (pad == 0 || c == 0) return;
    const int64_t lines = h + 2 * pad, edge = pad * c;
    parallel_for(0, n * lines, grain(line()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        uint8_t* to = q + i * line();
        const bool inside = i % lines >= pad && i % lines < pad + h;
        std::memset(to, value, size_t(inside ? edge : line()));
        if (inside) std::memset(to + line() - edge, value, size_t(edge));
      }
    });
  }
};

template <class T>
struct Encoded {  // puts a row away as codes
  using V = Vector<Acc<T>>;
  uint8_t* to;
  const Coder<Acc<T>>& code;
  void four(int64_t i, V a, V b, V c, V d) const { store_codes<T>(to + i, code(a), code(b), code(c), code(d)); }
  void two(int64_t i, V a, V b) const { store_codes<T>(to + i, code(a), code(b)); }
  void some(int64_t i, V v, int n) const { store_codes(to + i, code(v), n); }
};

template <class T>
struct Spread {  // keeps the range of a row only
  using V = Vector<Acc<T>>;
  Lanes<Acc<T>> lanes[2];
  void two(int64_t, V a, V b) {
    lanes[0].add(a);
    lanes[1].add(b);
  }
  void four(int64_t i, V a, V b, V c, V d) {
    two(i, a, b);
    two(i, c, d);
  }
  void some(int64_t, V v, int n) {
    for (int i = n; i < kLanes<Acc<T>>; ++i) v[i] = 0;
    lanes[0].add(v);
  }
  Range range() const {
    Lanes<Acc<T>> all = lanes[0];
    all.join(lanes[1]);
    return all.range();
  }
};

// put() of n adjacent numbers, in vectors.
template <class T, class Put>
inline void read_row(const T* x, int64_t n, Put&& put) {
  using V = Vector<Acc<T>>;
  for_row<T>(n, [&](int64_t i, V& a, V& b) { load_pair(x + i, a, b); },
             [&](int64_t i, int count) { return load_some(x + i, count); }, put);
}

constexpr int64_t kPart = 16384;  // numbers read at a time

template <class T>
inline Range range_of(const T* x, int64_t n) {
  return parallel_range((n + kPart - 1) / kPart, 2, [&](int64_t begin, int64_t end) {
    Spread<T> spread;
    for (int64_t i = begin; i < end; ++i) read_row(x + i * kPart, std::min(kPart, n - i * kPart), spread);
    return spread.range();
  });
}

inline Codes empty_codes(const Tensor& x, const Sizes& sizes, const Sizes& strides) {
  return {empty_strided(x, sizes, strides, aoti_torch_dtype_uint8()),
          empty_strided(x, {1}, {1}, aoti_torch_dtype_float32()),
          empty_strided(x, {1}, {1}, aoti_torch_dtype_int32())};
}

// The memory for x's codes: channels-last with a border for images (N, C, H, W), x's own order otherwise.
inline Codes empty_image_codes(const Tensor& x, int64_t pad) {
  Sizes sizes = sizes_of(x);
  if (sizes.size() != 4) {
    LDMFAST_CHECK(pad == 0, "only images (N, C, H, W) can be padded");
    return empty_codes(x, sizes, strides_in(sizes, is_channels_last(x) ? channels_last(sizes.size())
                                                                       : row_major(sizes.size())));
  }
  sizes[2] += 2 * pad;
  sizes[3] += 2 * pad;
  const int64_t line = sizes[3] * sizes[1];
  return empty_codes(x, sizes, {sizes[2] * line, 1, line, sizes[1]});
}

inline Image image_of(const Tensor& x, int64_t pad) {
  return x.dim() == 4 ? Image{x.size(0), x.size(1), x.size(2), x.size(3), pad} : Image{};
}

// x in the order its codes have.
inline Tensor code_order(const Tensor& x) {
  if (x.dim() != 4) return is_channels_last(x) ? x : torch::stable::contiguous(x);
  if (is_dense(x, channels_last(4))) return x;
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

template <class A>
inline Coder<A> finish(const Codes& codes, const Range& range) {
  const Coder<A> coder(range);
  *mutable_data<float>(std::get<1>(codes)) = coder.scale;
  *mutable_data<int32_t>(std::get<2>(codes)) = coder.zero_point;
  return coder;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
