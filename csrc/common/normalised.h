// The input of a product, normalised while it is packed: the result of the norm is never in memory.
#pragma once

#include "group_norm.h"
#include "images.h"

namespace LDMFAST_LEVEL_NAMESPACE {

// encode(to) puts a row of numbers of T away at `to` (pairs.h), as codes or rounded.
template <class T, bool silu, class Encode>
struct Normalised {
  typedef Acc<T> A;
  typedef Vector<A> V;
  const T* x;
  const Affine<A>& f;
  int64_t channels;  // of a picture: those of f
  const Encode& encode;

  void prefetch(int64_t at) const { __builtin_prefetch(x + at); }

  template <int64_t whole, class In>
  void chunk(In* to, int64_t picture, int64_t at, int64_t channel, int64_t count) const {
    const int64_t first = picture * channels + channel;
    const A *const centre = &f.centre[size_t(first)], *const gain = &f.gain[size_t(first)];
    const A* const offset = &f.offset[size_t(first)];
    const T* const from = x + at;
    const auto y = [&](V v, int64_t c) {
      const V n = normalised<T>(v, load(centre + c), load(gain + c), load(offset + c));
      if constexpr (silu) return silu_of<T>(n);
      return n;
    };
    for_row<T>(
        whole > 0 ? whole : count,
        [&](int64_t c, V& a, V& b) {
          load_pair(from + c, a, b);
          a = y(a, c);
          b = y(b, c + kLanes<A>);
        },
        [&](int64_t c, int n) {
          const V v = load_some(from + c, n);
          return y(v, c);
        },
        encode(to));
  }
};

// product() of x normalised by f, then SiLU if asked.
template <class P, class T, class Encode, class Put>
inline void normalised_product(const Convolution& c, const T* x, const Affine<Acc<T>>& f, bool silu,
                               const typename P::Weight* weight, typename P::In outside, const Encode& encode,
                               const Put& put) {
  if (silu)
    product<P>(c, Normalised<T, true, Encode>{x, f, c.channels, encode}, weight, outside, put);
  else
    product<P>(c, Normalised<T, false, Encode>{x, f, c.channels, encode}, weight, outside, put);
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
