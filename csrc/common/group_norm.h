// GroupNorm on the CPU: statistics, and the affine map of each channel that they make. What happens to the normalised
// numbers (SiLU, rounding to a dtype or to uint8 codes) is the caller's.
//
// Statistics are taken in pieces of some ten thousand elements, each read once: sums and squares of the distance to
// the mean of the first few, joined in fp64 (Chan, Golub and LeVeque 1979, equation 2.1). With m of n numbers in that
// first mean, one outlier among them makes rounding errors 1 + n / m^2 times larger than those of two passes. The
// split depends on the picture's size only, so neither threads nor batch change a result.
#pragma once

#include <algorithm>

#include "activation.h"
#include "q8.h"

namespace LDMFAST_LEVEL_NAMESPACE {

struct Moments {  // count, mean and sum of squared deviations
  double n = 0, mean = 0, m2 = 0;
  void join(double n_, double mean_, double m2_) {
    if (n_ == 0) return;
    const double both = n + n_, delta = mean_ - mean;
    mean += delta * (n_ / both);
    m2 += m2_ + delta * delta * (n * n_ / both);
    n = both;
  }
};

struct Shape {
  int64_t n, c, pixels, groups;
};

// What is gathered for each channel of a piece (or for each vector lane of a run).
template <class A>
struct Gathered {
  A *first, *total, *squares, *lo, *hi;  // about where x is; sum and squares of x - first; least and largest x
};

template <bool ranged, class V, class A>
inline void gather(V x, V first, V& total, V& squares, V& lo, V& hi) {
  const V d = x - first;
  total += d;
  squares += d * d;
  if constexpr (ranged) lo = min(lo, x), hi = max(hi, x);
}

// `pixels` pixels of kPair channels from c on, `stride` elements apart, added to what `to` holds.
template <bool ranged, class T>
inline void gather_pair(const T* x, int64_t pixels, int64_t stride, const Gathered<Acc<T>>& to, int64_t c) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const V first[2] = {load(to.first + c), load(to.first + c + L)};
  V total[2] = {load(to.total + c), load(to.total + c + L)}, lo[2] = {}, hi[2] = {};
  V squares[2] = {load(to.squares + c), load(to.squares + c + L)};
  if constexpr (ranged) {
    for (int b = 0; b < 2; ++b) lo[b] = load(to.lo + c + b * L), hi[b] = load(to.hi + c + b * L);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    V v[2];
    load_pair(x + p * stride, v[0], v[1]);
    for (int b = 0; b < 2; ++b) gather<ranged, V, A>(v[b], first[b], total[b], squares[b], lo[b], hi[b]);
  }
  for (int b = 0; b < 2; ++b) {
    store(to.total + c + b * L, total[b]);
    store(to.squares + c + b * L, squares[b]);
    if constexpr (ranged) store(to.lo + c + b * L, lo[b]), store(to.hi + c + b * L, hi[b]);
  }
}

// The same for `lanes` <= kLanes channels.
template <bool ranged, class T>
inline void gather_some(const T* x, int64_t pixels, int64_t stride, int lanes, const Gathered<Acc<T>>& to, int64_t c) {
  using A = Acc<T>;
  using V = Vector<A>;
  const V first = load(to.first + c);
  V total = load(to.total + c), squares = load(to.squares + c), lo{}, hi{};
  if constexpr (ranged) lo = load(to.lo + c), hi = load(to.hi + c);
  for (int64_t p = 0; p < pixels; ++p) {
    const V v = load_some(x + p * stride, lanes);
    gather<ranged, V, A>(v, first, total, squares, lo, hi);
  }
  store(to.total + c, total);
  store(to.squares + c, squares);
  if constexpr (ranged) store(to.lo + c, lo), store(to.hi + c, hi);
}

template <bool ranged, class T>
void piece_channels_last(const T* x, int64_t pixels, const Shape& s, const Acc<T>* shift, Moments* out,
                         Gathered<Acc<T>> to) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t together = 8;  // pixels: enough to hide loading and storing the sums, few enough streams to fetch
  const int64_t sample = std::min(together, pixels), paired = s.c / kPair<T> * kPair<T>;
  const auto gather_row = [&](const T* from, int64_t count, auto with_range) {
    constexpr bool both = decltype(with_range)::value;
    int64_t c = 0;
    for (; c < paired; c += kPair<T>) gather_pair<both>(from + c, count, s.c, to, c);
    for (; c < s.c; c += L) gather_some<both>(from + c, count, s.c, int(std::min<int64_t>(L, s.c - c)), to, c);
  };
  for (int64_t c = 0; c < s.c; c += L) {
    for (A* zero : {to.first, to.total, to.squares}) store(zero + c, Vector<A>{});
    if constexpr (ranged) {
      store(to.lo + c, splat(std::numeric_limits<A>::infinity()));
      store(to.hi + c, splat(-std::numeric_limits<A>::infinity()));
    }
  }
  gather_row(x, sample, std::false_type());
  for (int64_t c = 0; c < s.c; c += L) {
    store(to.first + c, load(to.total + c) / A(sample));
    for (A* zero : {to.total, to.squares}) store(zero + c, Vector<A>{});
  }
  for (int64_t p = 0; p < pixels; p += together)
    gather_row(x + p * s.c, std::min(together, pixels - p), std::bool_constant<ranged>());
  const int64_t width = s.c / s.groups;
  const double share = 1 / double(pixels);
  const auto mean = [&](int64_t i) {
    const int64_t at = slot<T>(i, s.c);
    return double(to.first[at]) + double(to.total[at]) * share + (shift ? double(shift[i]) : 0.0);
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    double average = 0, squares = 0, spread = 0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) {
      average += mean(i);
      const double total = double(to.total[slot<T>(i, s.c)]);
      squares += double(to.squares[slot<T>(i, s.c)]) - total * total * share;
    }
    average /= double(width);
    for (int64_t i = g * width; i < (g + 1) * width; ++i) spread += (mean(i) - average) * (mean(i) - average);
    out[g].join(double(pixels * width), average, squares + spread * double(pixels));
  }
}

// n adjacent numbers of one channel.
template <bool ranged, class T>
void join_run(const T* x, int64_t n, Acc<T> shift, Moments& out, Acc<T>& least, Acc<T>& most) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t sample = std::min<int64_t>(n, 128);
  V head{};
  for (int64_t i = 0; i < sample; i += L) head += sample - i >= L ? load(x + i) : load_some(x + i, int(sample - i));
  const A first = tree_sum<A>(head) / A(sample);
  const V start = splat(first);
  V total[2] = {}, squares[2] = {}, lo = start, hi = start;
  int64_t i = 0;
  for (; i + kPair<T> <= n; i += kPair<T>) {
    V v[2];
    load_pair(x + i, v[0], v[1]);
    for (int b = 0; b < 2; ++b) gather<ranged, V, A>(v[b], start, total[b], squares[b], lo, hi);
  }
  for (int count; i < n; i += count) {
    count = int(std::min<int64_t>(L, n - i));
    V v = load_some(x + i, count);
    for (int l = count; l < L; ++l) v[l] = first;  // within the range, and no distance from itself
    gather<ranged, V, A>(v, start, total[0], squares[0], lo, hi);
  }
  const double sum_d = double(tree_sum<A>(total[0] + total[1])), sum_d2 = double(tree_sum<A>(squares[0] + squares[1]));
  if constexpr (ranged)
    for (int l = 0; l < L; ++l) least = std::min(least, A(lo[l])), most = std::max(most, A(hi[l]));
  out.join(double(n), double(first) + sum_d / double(n) + double(shift), sum_d2 - sum_d * sum_d / double(n));
}

template <class A>
struct Affine {  // per picture and slot of a channel; least and largest x, if they were wanted
  std::vector<A> centre, gain, offset, lo, hi;
};

// y = (x - centre) * gain + offset. A rough T has centre 0: the rounding of x * gain is far below its own.
template <class T, class V>
inline V normalised(V x, V centre, V gain, V offset) {
  if constexpr (kRough<T>) return x * gain + offset;
  return (x - centre) * gain + offset;
}

template <class T>
struct Normalisation {
  using A = Acc<T>;
  const T* x;
  Shape shape;
  bool last;  // channels-last
  std::vector<A> shift;
  const OptionalTensor &weight, &bias;
  double eps;

  template <bool ranged>
  Affine<A> affine() const {
    const size_t channels = size_t(shape.n * shape.c);
    const std::vector<A> zeros(channels + L);  // the last vector is read whole
    Affine<A> f{zeros, zeros, zeros, {}, {}};
    if constexpr (ranged) {
      f.lo.assign(channels, std::numeric_limits<A>::infinity());
      f.hi.assign(channels, -std::numeric_limits<A>::infinity());
    }
    finish(last ? moments_channels_last<ranged>(f) : moments_contiguous<ranged>(f), f);
    return f;
  }

  // Hands act(normalised x) to put(i), which puts a row away (pairs.h) from element i on, where `image` has it.
  template <class Act, class Put>
  void apply(const Affine<A>& f, const Image& image, const Act& act, const Put& put) const {
    last ? apply_channels_last(f, image, act, put) : apply_contiguous(f, act, put);
  }

 private:
  static constexpr int L = kLanes<A>;
  using V = Vector<A>;

  int64_t piece() const { return 32768 / shape.c > 8 ? 32768 / shape.c : 8; }
  int64_t pieces() const { return (shape.pixels + piece() - 1) / piece(); }

  template <bool ranged>
  std::vector<Moments> moments_channels_last(Affine<A>& f) const {
    const Shape& s = shape;
    const int64_t count = pieces();
    std::vector<Moments> parts(size_t(s.n * count * s.groups)), whole(size_t(s.n * s.groups));
    std::mutex mutex;
    parallel_for(0, s.n * count, 1, [&](int64_t begin, int64_t end) {
      const int64_t padded = s.c + L;
      std::vector<A> buffer(size_t(5 * padded));
      A* at = buffer.data();
      const Gathered<A> gathered{at, at + padded, at + 2 * padded, at + 3 * padded, at + 4 * padded};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / count, first = i % count * piece();
        piece_channels_last<ranged>(x + (n * s.pixels + first) * s.c, std::min(piece(), s.pixels - first), s,
                                    shift.empty() ? nullptr : &shift[size_t(n * s.c)], &parts[size_t(i * s.groups)],
                                    gathered);
        if constexpr (ranged) {
          const std::lock_guard<std::mutex> lock(mutex);
          A *lo = &f.lo[size_t(n * s.c)], *hi = &f.hi[size_t(n * s.c)];
          for (int64_t c = 0; c < s.c; ++c) {
            lo[c] = std::min(lo[c], gathered.lo[c]);
            hi[c] = std::max(hi[c], gathered.hi[c]);
          }
        }
      }
    });
    for (int64_t i = 0; i < s.n * count; ++i)
      for (int64_t g = 0; g < s.groups; ++g) {
        const Moments& m = parts[size_t(i * s.groups + g)];
        whole[size_t(i / count * s.groups + g)].join(m.n, m.mean, m.m2);
      }
    return whole;
  }

  template <bool ranged>
  std::vector<Moments> moments_contiguous(Affine<A>& f) const {
    constexpr int64_t run = 8192;
    const int64_t width = shape.c / shape.groups;
    std::vector<Moments> whole(size_t(shape.n * shape.groups));
    A unused = 0;
    parallel_for(0, shape.n * shape.groups, grain(width * shape.pixels), [&](int64_t begin, int64_t end) {
      if (!ranged && shift.empty()) {  // a group is one run
        const int64_t n = width * shape.pixels;
        for (int64_t i = begin; i < end; ++i)
          for (int64_t p = 0; p < n; p += run)
            join_run<false>(x + i * n + p, std::min(run, n - p), A(0), whole[size_t(i)], unused, unused);
        return;
      }
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = i * width; c < (i + 1) * width; ++c)
          for (int64_t p = 0; p < shape.pixels; p += run)
            join_run<ranged>(x + c * shape.pixels + p, std::min(run, shape.pixels - p),
                             shift.empty() ? A(0) : shift[size_t(c)], whole[size_t(i)],
                             ranged ? f.lo[size_t(c)] : unused, ranged ? f.hi[size_t(c)] : unused);
    });
    return whole;
  }

  void finish(const std::vector<Moments>& moments, Affine<A>& f) const {
    const int64_t width = shape.c / shape.groups;
    const std::vector<A> w = parameters<A>(weight, 1, shape.c, 1), b = parameters<A>(bias, 1, shape.c, 0);
    for (int64_t i = 0; i < shape.n * shape.groups; ++i) {
      const Moments& m = moments[size_t(i)];
      const double inverse = 1 / std::sqrt(m.m2 / m.n + eps);
      for (int64_t at = i * width; at < (i + 1) * width; ++at) {
        const int64_t c = at % shape.c;
        const double centre = m.mean - (shift.empty() ? 0.0 : double(shift[size_t(at)]));
        const size_t to = size_t(last ? at - c + slot<T>(c, shape.c) : at);
        f.gain[to] = A(double(w[size_t(c)]) * inverse);
        if (!kRough<T>) f.centre[to] = A(centre);
        f.offset[to] = A(double(b[size_t(c)]) + (double(f.centre[to]) - centre) * double(f.gain[to]));
      }
    }
  }

  template <class Act, class Put>
  void apply_channels_last(const Affine<A>& f, const Image& image, const Act& act, const Put& put) const {
    const Shape& s = shape;
    const int64_t count = pieces();
    parallel_for(0, s.n * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) {  // backwards: what the first pass read last is still in the cache
        const int64_t n = i / count, first = i % count * piece(), stop = std::min(first + piece(), s.pixels);
        const A *centre = &f.centre[size_t(n * s.c)], *gain = &f.gain[size_t(n * s.c)];
        const A* offset = &f.offset[size_t(n * s.c)];
        const auto y = [&](V v, int64_t c) {
          return act(normalised<T>(v, load(centre + c), load(gain + c), load(offset + c)));
        };
        for (int64_t p = first, run; p < stop; p += run) {
          run = image.run(p, stop - p);
          const T* from = x + (n * s.pixels + p) * s.c;
          int64_t to = image.at(n, p);
          for (int64_t k = 0; k < run; ++k, from += s.c, to += s.c)
            for_row<T>(
                s.c,
                [&](int64_t c, V& a, V& b) {
                  load_pair(from + c, a, b);
                  a = y(a, c);
                  b = y(b, c + L);
                },
                [&](int64_t c, int n) {
                  const V v = load_some(from + c, n);
                  return y(v, c);
                },
                put(to));
        }
      }
    });
  }

  template <class Act, class Put>
  void apply_contiguous(const Affine<A>& f, const Act& act, const Put& put) const {
    const int64_t pixels = shape.pixels;
    parallel_for(0, shape.n * shape.c, grain(pixels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const V centre = splat(f.centre[size_t(i)]), gain = splat(f.gain[size_t(i)]);
        const V offset = splat(f.offset[size_t(i)]);
        const auto y = [&](V v) { return act(normalised<T>(v, centre, gain, offset)); };
        const T* from = x + i * pixels;
        for_row<T>(
            pixels,
            [&](int64_t p, V& a, V& b) {
              load_pair(from + p, a, b);
              a = y(a);
              b = y(b);
            },
            [&](int64_t p, int n) {
              const V v = load_some(from + p, n);
              return y(v);
            },
            put(i * pixels));
      }
    });
  }
};

inline Shape shape_of(const Tensor& x, int64_t groups) {
  Shape s{x.size(0), x.size(1), 1, groups};
  for (int64_t d = 2; d < x.dim(); ++d) s.pixels *= x.size(d);
  LDMFAST_CHECK(groups > 0 && s.c % groups == 0, "group_norm_silu: channels do not split into the groups");
  return s;
}

template <class T>
inline Normalisation<T> normalisation(const Tensor& dense, const Shape& shape, bool last, const OptionalTensor& shift,
                                      const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  std::vector<Acc<T>> shifts;
  if (shift.has_value()) shifts = parameters<Acc<T>>(shift, shape.n, shape.c, 0);
  return {data<T>(dense), shape, last, std::move(shifts), weight, bias, eps};
}

// The range of the result, before any of it is computed, from the least and largest x of each channel: the map is affine,
// and SiLU falls to its only minimum and rises from there on.
constexpr double kLowest = -0.2784645427610738, kLowestAt = -1.2784645427610738;  // minimum of SiLU, and where

inline double exact_silu(double y) { return y / (1 + std::exp(-y)); }

template <class A>
inline Range range_of(const Affine<A>& f, bool with_silu) {
  Range range;
  for (size_t i = 0; i < f.lo.size(); ++i) {
    const auto y = [&](A x) { return (double(x) - double(f.centre[i])) * double(f.gain[i]) + double(f.offset[i]); };
    const double one = y(f.lo[i]), other = y(f.hi[i]);
    range.add(with_silu ? exact_silu(one) : one);
    range.add(with_silu ? exact_silu(other) : other);
    if (with_silu && std::min(one, other) < kLowestAt && std::max(one, other) > kLowestAt) range.add(kLowest);
  }
  return range;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE
