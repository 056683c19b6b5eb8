// qk_norm_rope: RMS norm and rotary embedding of the queries and keys in one or two packed projections, the second of
// which (the text's tokens) comes first in the result. A head is two halves of channels, a and b, that the embedding
// turns in the planes (a[i], b[i]); in memory they follow each other or alternate.
#include "common/pairs.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

// Elements 0, 2, 4, ... and 1, 3, 5, ... of two vectors that follow each other, and back.
template <class V, int... i>
inline void unzip(V& a, V& b, std::integer_sequence<int, i...>) {
  const V even = __builtin_shufflevector(a, b, (2 * i)...), odd = __builtin_shufflevector(a, b, (2 * i + 1)...);
  a = even;
  b = odd;
}
template <class V, int... i>
inline void zip(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  const V low = __builtin_shufflevector(a, b, (i / 2 + i % 2 * L)...);
  const V high = __builtin_shufflevector(a, b, (L / 2 + i / 2 + i % 2 * L)...);
  a = low;
  b = high;
}

// n elements of each half, from the i-th on; other lanes load as zero.
template <class T, bool alternate>
struct Halves {
  using V = Vector<Acc<T>>;
  using Lanes = std::make_integer_sequence<int, kLanes<Acc<T>>>;

  static void get(const T* head, int64_t half, int64_t i, int n, V& a, V& b) {
    constexpr int L = kLanes<Acc<T>>;
    if constexpr (alternate) {
      T few[2 * L] = {};
      const T* from = head + 2 * i;
      if (n < L) {
        std::memcpy(static_cast<void*>(few), from, size_t(2 * n) * sizeof(T));
        from = few;
      }
      load_pair(from, a, b);
      if constexpr (!kInterleaved<T>) unzip(a, b, Lanes{});
    } else {
      a = n == L ? load(head + i) : load_some(head + i, n);
      b = n == L ? load(head + half + i) : load_some(head + half + i, n);
    }
  }

  static void put(T* head, int64_t half, int64_t i, int n, V a, V b) {
    constexpr int L = kLanes<Acc<T>>;
    if constexpr (alternate) {
      if constexpr (!kInterleaved<T>) zip(a, b, Lanes{});
      T few[2 * L];
      T* const to = head + 2 * i;
      store_pair(n < L ? few : to, a, b);
      if (n < L) std::memcpy(static_cast<void*>(to), few, size_t(2 * n) * sizeof(T));
    } else if (n == L) {
      store(head + i, a);
      store(head + half + i, b);
    } else {
      store(head + i, a, n);
      store(head + half + i, b, n);
    }
  }
};

struct Packed {  // (batch, tokens, 3, heads, depth) with adjacent channels
  Tensor tensor;
  int64_t tokens, batch_step, token, part, head;
};

Packed packed(const Tensor& t) {
  const Tensor x = t.size(4) < 2 || t.stride(4) == 1 ? t : torch::stable::contiguous(t);
  return {x, x.size(1), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class A>
struct Weights {  // of one projection's queries and keys, first those of half a, then those of half b
  std::vector<A> part[2];
};

template <class A>
Weights<A> weights(const OptionalTensor& q, const OptionalTensor& k, int64_t half, bool alternate) {
  Weights<A> w;
  const OptionalTensor* given[2] = {&q, &k};
  for (int p = 0; p < 2; ++p) {
    const std::vector<A> plain = parameters<A>(*given[p], 1, 2 * half, 1);
    w.part[p].resize(size_t(2 * half + kLanes<A>));  // the last vector is read whole
    for (int64_t i = 0; i < 2 * half; ++i)
      w.part[p][size_t(alternate ? i % 2 * half + i / 2 : i)] = plain[size_t(i)];
  }
  return w;
}

template <class T>
struct Head {
  using A = Acc<T>;
  int64_t half;
  bool norm;
  double eps;
  const A *cos, *sin;  // of this token, or null

  template <bool alternate>
  void run(const T* in, const A* weight, T* out) const {
    using V = Vector<A>;
    using H = Halves<T, alternate>;
    constexpr int L = kLanes<A>;
    const auto each = [&](auto&& f) {
      int64_t i = 0;
      for (; i + L <= half; i += L) f(i, L);
      if (i < half) f(i, int(half - i));
    };
    A inverse = 1;
    if (norm) {
      V squares[2] = {};
      each([&](int64_t i, int n) {
        V a, b;
        H::get(in, half, i, n, a, b);
        squares[0] += a * a;
        squares[1] += b * b;
      });
      inverse = A(1 / std::sqrt(double(tree_sum<A>(squares[0] + squares[1]) / A(2 * half)) + eps));
    }
    each([&](int64_t i, int n) {
      V a, b;
      H::get(in, half, i, n, a, b);
      if (norm) {
        a = a * inverse * load(weight + i);
        b = b * inverse * load(weight + half + i);
      }
      if (cos != nullptr) {
        const V c = n == L ? load(cos + i) : load_some(cos + i, n), s = n == L ? load(sin + i) : load_some(sin + i, n);
        const V turned = b * c + a * s;
        a = a * c - b * s;
        b = turned;
      }
      H::put(out, half, i, n, a, b);
    });
  }
};

template <class T>
struct Join {
  using A = Acc<T>;
  const Packed* source[2];  // text (null if there is none), image
  Weights<A> weight[2];
  int64_t text, total, heads, half, parts;  // parts of the result: queries, keys and, if joined, values
  bool norm, alternate;
  double eps;
  const A *cos, *sin;
  int64_t table_step;  // from one batch element's table to the next

  void token(int64_t index, T* out) const {
    const int64_t b = index / total, t = index % total, depth = 2 * half;
    const int image = t >= text;
    const Packed& from = *source[image];
    const T* x = data<T>(from.tensor) + b * from.batch_step + (image ? t - text : t) * from.token;
    const int64_t row = b * table_step + t * half;
    const Head<T> head{half, norm, eps, cos == nullptr ? nullptr : cos + row, sin == nullptr ? nullptr : sin + row};
    T* to = out + index * parts * heads * depth;
    for (int p = 0; p < 2; ++p)
      for (int64_t h = 0; h < heads; ++h, to += depth) {
        const T* in = x + p * from.part + h * from.head;
        const A* w = weight[image].part[p].data();
        alternate ? head.template run<true>(in, w, to) : head.template run<false>(in, w, to);
      }
    if (parts == 2) return;
    x += 2 * from.part;
    if (from.head == depth)
      std::memcpy(static_cast<void*>(to), x, size_t(heads * depth) * sizeof(T));
    else
      for (int64_t h = 0; h < heads; ++h)
        std::memcpy(static_cast<void*>(to + h * depth), x + h * from.head, size_t(depth) * sizeof(T));
  }
};

}  // namespace

Tensor qk_norm_rope(const Tensor& qkv, const OptionalTensor& context, const OptionalTensor& q_weight,
                    const OptionalTensor& k_weight, const OptionalTensor& context_q_weight,
                    const OptionalTensor& context_k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                    bool interleaved, std::optional<double> eps) {
  const Packed image = packed(qkv), text = packed(context.has_value() ? *context : qkv);
  const int64_t before = context.has_value() ? text.tokens : 0, total = before + image.tokens;
  const int64_t batch = qkv.size(0), parts = context.has_value() ? 3 : 2, heads = qkv.size(3), depth = qkv.size(4);
  LDMFAST_CHECK(depth % 2 == 0 && qkv.size(2) == 3, "qk_norm_rope: (batch, tokens, 3, heads, even head_dim)");
  Tensor out = empty_in(qkv, {batch, total, parts, heads, depth}, false);
  if (out.numel() == 0) return out;
  dispatch(qkv, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const A* table[2] = {};
    int64_t step = 0;
    if (cos.has_value() && sin.has_value()) {
      for (const OptionalTensor* p : {&cos, &sin})
        LDMFAST_CHECK((*p)->element_size() == int64_t(sizeof(A)) && (*p)->is_contiguous() &&
                          ((*p)->numel() == total * depth / 2 || (*p)->numel() == batch * total * depth / 2),
                      "qk_norm_rope: cos and sin are dense and fp32, or fp64 for fp64");
      table[0] = data<A>(*cos);
      table[1] = data<A>(*sin);
      step = cos->dim() == 3 && cos->size(0) > 1 ? total * depth / 2 : 0;
    }
    const Join<T> join{{&text, &image},
                       {weights<A>(context_q_weight, context_k_weight, depth / 2, interleaved),
                        weights<A>(q_weight, k_weight, depth / 2, interleaved)},
                       before, total, heads, depth / 2, parts, eps.has_value(), interleaved, eps.value_or(0),
                       table[0], table[1], step};
    T* to = mutable_data<T>(out);
    parallel_for(0, batch * total, grain(parts * heads * depth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) join.token(i, to);
    });
    return 0;
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(qk_norm_rope)
