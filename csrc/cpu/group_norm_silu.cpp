// group_norm_silu: y = silu((x + shift - mean_g) / sqrt(var_g + eps) * weight + bias), channels-last or not.
//
// Statistics are taken in fixed pieces of a few thousand elements, each read once from memory and twice from the
// cache (mean, then squared deviations), and joined in fp64 (Chan, Golub and LeVeque 1979, equation 2.1). The
// split depends on the picture's size only, so neither threads nor batch change a result.
#include <algorithm>

#include "common/dispatch.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

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

template <class A>
struct Affine {  // per picture and channel: y = (x - centre) * gain + offset
  std::vector<A> centre, gain, offset;
};

// Means and squared deviations of `lanes` channels over `pixels` pixels that lie `stride` elements apart. The mean
// is mean + rest: the rounding of a long sum shows up in the deviations, whose own sum is small and exact.
template <int blocks, class T>
void channel_moments(const T* x, int64_t pixels, int64_t stride, int lanes, Acc<T>* mean, Acc<T>* rest, Acc<T>* m2) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const auto get = [&](int64_t p, int b) {
    return lanes == blocks * L ? load(x + p * stride + b * L) : load(x + p * stride + b * L, lanes);
  };
  V total[blocks] = {}, off[blocks] = {}, squares[blocks] = {};
  for (int64_t p = 0; p < pixels; ++p)
    for (int b = 0; b < blocks; ++b) total[b] += get(p, b);
  for (int b = 0; b < blocks; ++b) total[b] /= A(pixels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int b = 0; b < blocks; ++b) {
      const V d = get(p, b) - total[b];
      off[b] += d;
      squares[b] += d * d;
    }
  for (int b = 0; b < blocks; ++b) {
    const V correction = off[b] / A(pixels);
    store(mean + b * L, total[b]);
    store(rest + b * L, correction);
    store(m2 + b * L, squares[b] - off[b] * correction);
  }
}

template <class T>
void piece_channels_last(const T* x, int64_t pixels, const Shape& s, const Acc<T>* shift, Moments* out) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t padded = s.c + L;
  std::vector<A> buffer(size_t(3 * padded));
  A *mean = buffer.data(), *rest = mean + padded, *m2 = rest + padded;
  int64_t c = 0;
  for (; c + 4 * L <= s.c; c += 4 * L) channel_moments<4>(x + c, pixels, s.c, 4 * L, mean + c, rest + c, m2 + c);
  for (; c < s.c; c += L)
    channel_moments<1>(x + c, pixels, s.c, int(s.c - c < L ? s.c - c : L), mean + c, rest + c, m2 + c);
  const auto channel_mean = [&](int64_t i) {
    return double(mean[i]) + double(rest[i]) + (shift ? double(shift[i]) : 0.0);
  };
  const int64_t width = s.c / s.groups;
  for (int64_t g = 0; g < s.groups; ++g) {
    double average = 0, squares = 0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) {
      average += channel_mean(i);
      squares += double(m2[i]);
    }
    average /= double(width);
    double spread = 0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) {
      const double d = channel_mean(i) - average;
      spread += d * d;
    }
    out[g].join(double(pixels * width), average, squares + spread * double(pixels));
  }
}

// n adjacent numbers of one channel.
template <class T>
void join_run(const T* x, int64_t n, Acc<T> shift, Moments& out) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t whole = n / L * L;
  V total{}, off{}, squares{};
  for (int64_t i = 0; i < whole; i += L) total += load(x + i);
  A mean = sum(total);
  for (int64_t i = whole; i < n; ++i) mean += A(to_float(x[i]));
  mean /= A(n);
  for (int64_t i = 0; i < whole; i += L) {
    const V d = load(x + i) - mean;
    off += d;
    squares += d * d;
  }
  A rest = sum(off), m2 = sum(squares);
  for (int64_t i = whole; i < n; ++i) {
    const A d = A(to_float(x[i])) - mean;
    rest += d;
    m2 += d * d;
  }
  out.join(double(n), double(mean) + double(rest) / double(n) + double(shift), double(m2 - rest * (rest / A(n))));
}

template <class A>
Affine<A> finish(const std::vector<Moments>& moments, const Shape& s, const std::vector<A>& shift,
                 const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const std::vector<A> w = parameters<A>(weight, 1, s.c, 1), b = parameters<A>(bias, 1, s.c, 0);
  Affine<A> f{std::vector<A>(size_t(s.n * s.c)), std::vector<A>(size_t(s.n * s.c)), std::vector<A>(size_t(s.n * s.c))};
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < s.c; ++c) {
      const Moments& m = moments[size_t(n * s.groups + c / (s.c / s.groups))];
      const size_t i = size_t(n * s.c + c);
      const double centre = m.mean - (shift.empty() ? 0.0 : double(shift[i]));
      const double gain = double(w[size_t(c)]) / std::sqrt(m.m2 / m.n + eps);
      f.centre[i] = A(centre);
      f.gain[i] = A(gain);
      f.offset[i] = A(double(b[size_t(c)]) + (double(f.centre[i]) - centre) * gain);  // what rounding the mean lost
    }
  return f;
}

template <bool with_silu, class V>
V apply(V x, V centre, V gain, V offset) {
  const V y = (x - centre) * gain + offset;
  if constexpr (with_silu) return silu(y);
  return y;
}

template <bool with_silu, class T>
void run_channels_last(const T* x, T* y, const Shape& s, const std::vector<Acc<T>>& shift,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t piece = 16384 / s.c > 8 ? 16384 / s.c : 8, pieces = (s.pixels + piece - 1) / piece;
  std::vector<Moments> parts(size_t(s.n * pieces * s.groups)), moments(size_t(s.n * s.groups));
  const auto first = [&](int64_t i) { return i % pieces * piece; };
  const auto size = [&](int64_t i) { return std::min(piece, s.pixels - first(i)); };
  const auto start = [&](int64_t i) { return (i / pieces * s.pixels + first(i)) * s.c; };
  parallel_for(0, s.n * pieces, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece_channels_last(x + start(i), size(i), s, shift.empty() ? nullptr : &shift[size_t(i / pieces * s.c)],
                          &parts[size_t(i * s.groups)]);
  });
  for (int64_t i = 0; i < s.n * pieces; ++i)
    for (int64_t g = 0; g < s.groups; ++g) {
      const Moments& m = parts[size_t(i * s.groups + g)];
      moments[size_t(i / pieces * s.groups + g)].join(m.n, m.mean, m.m2);
    }
  const Affine<A> f = finish(moments, s, shift, weight, bias, eps);
  parallel_for(0, s.n * pieces, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t picture = size_t(i / pieces * s.c);
      const A *centre = &f.centre[picture], *gain = &f.gain[picture], *offset = &f.offset[picture];
      for (int64_t at = start(i), stop = at + size(i) * s.c; at < stop; at += s.c) {
        int64_t c = 0;
        for (; c + L <= s.c; c += L)
          store(y + at + c, apply<with_silu>(load(x + at + c), load(centre + c), load(gain + c), load(offset + c)));
        if (const int rest = int(s.c - c))
          store(y + at + c, apply<with_silu>(load(x + at + c, rest), load(centre + c, rest), load(gain + c, rest),
                                             load(offset + c, rest)), rest);
      }
    }
  });
}

template <bool with_silu, class T>
void run_contiguous(const T* x, T* y, const Shape& s, const std::vector<Acc<T>>& shift, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps) {
  using A = Acc<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  constexpr int64_t piece = 8192;
  const int64_t width = s.c / s.groups;
  std::vector<Moments> moments(size_t(s.n * s.groups));
  parallel_for(0, s.n * s.groups, grain(width * s.pixels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = i * width; c < (i + 1) * width; ++c)
        for (int64_t p = 0; p < s.pixels; p += piece)
          join_run(x + c * s.pixels + p, std::min(piece, s.pixels - p), shift.empty() ? A(0) : shift[size_t(c)],
                   moments[size_t(i)]);
  });
  const Affine<A> f = finish(moments, s, shift, weight, bias, eps);
  parallel_for(0, s.n * s.c, grain(s.pixels), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const V centre = splat(f.centre[size_t(i)]), gain = splat(f.gain[size_t(i)]);
      const V offset = splat(f.offset[size_t(i)]);
      const T* from = x + i * s.pixels;
      T* to = y + i * s.pixels;
      int64_t p = 0;
      for (; p + L <= s.pixels; p += L) store(to + p, apply<with_silu>(load(from + p), centre, gain, offset));
      if (const int rest = int(s.pixels - p))
        store(to + p, apply<with_silu>(load(from + p, rest), centre, gain, offset), rest);
    }
  });
}

}  // namespace

Tensor group_norm_silu(const Tensor& x, const OptionalTensor& shift, int64_t num_groups, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool silu) {
  const bool last = is_channels_last(x);
  const Tensor dense = last || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Sizes sizes = sizes_of(x);
  Shape s{sizes[0], sizes[1], 1, num_groups};
  for (size_t d = 2; d < sizes.size(); ++d) s.pixels *= sizes[d];
  LDMFAST_CHECK(num_groups > 0 && s.c % num_groups == 0, "group_norm_silu: channels do not split into the groups");
  Tensor out = empty_in(x, sizes, last);
  if (s.n * s.c * s.pixels == 0) return out;
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    const auto run = last ? (silu ? &run_channels_last<true, T> : &run_channels_last<false, T>)
                          : (silu ? &run_contiguous<true, T> : &run_contiguous<false, T>);
    std::vector<Acc<T>> shifts;
    if (shift.has_value()) shifts = parameters<Acc<T>>(shift, s.n, s.c, 0);
    run(data<T>(dense), mutable_data<T>(out), s, shifts, weight, bias, eps);
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(group_norm_silu)
