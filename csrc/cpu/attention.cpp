// attention: softmax(scale * q k^T + bias) v with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A task is a block of queries of one head. Keys and values are packed for the tile products once per head and
// thread, in stretches that fit the second-level cache; a stretch is then visited by all query blocks of the thread.
// The order in which a query meets its keys is fixed, so a result depends neither on threads nor on the batch.
#include <algorithm>
#include <memory>

#include "common/dispatch.h"
#include "common/stable.h"
#include "common/tile.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr int kKeys = 128;                  // keys of one softmax update
constexpr int64_t kStretchBytes = 1 << 19;  // packed keys and values kept in the second-level cache
constexpr float kLog2e = 1.44269504f;
const float kNone = -std::numeric_limits<float>::infinity();

struct Problem {
  const Tensor &q, &k, &v;
  const OptionalTensor& bias;
  double scale;
  bool causal;
  int64_t block;
  int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), depth = q.size(3);
  int64_t keys = k.size(1), kv_heads = k.size(2), width = v.size(3);

  // How many keys query i sees under the causal mask.
  int64_t visible(int64_t i) const {
    if (!causal) return keys;
    const int64_t at = i + keys - queries;
    return at < 0 ? 0 : std::min(keys, (at / block + 1) * block);
  }
};

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^x; `terms` of the polynomial: 3 gives 8e-5 (for weights that are rounded to bf16), 5 gives 1e-7.
template <int terms>
inline F exp2(F x) {
#if defined(__AVX512F__)
  const __m512 y = (__m512)max(splat(-150.0f), x);  // NaN stays
  const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = (F)_mm512_sub_ps(y, whole);
#else
  const F bounded = x < -126.0f ? splat(-126.0f) : x;
  I n;
  const F r = bounded - nearest(bounded, n);
#endif
  F p;
  if constexpr (terms == 3) {
    p = splat(0.0551710650f) * r + 0.2426120340f;
    p = p * r + 0.6932611465f;
    p = p * r + 0.9999279976f;
  } else {
    p = splat(0.0013264667f) * r + 0.0096715363f;
    p = p * r + 0.0555073373f;
    p = p * r + 0.2402224243f;
    p = p * r + 0.6931470037f;
    p = p * r + 1.0f;
  }
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, whole);
#else
  const F y = p * power_of_two(n);
  return x < -126.0f ? F{} : (x == x ? y : x);
#endif
}

inline float exp2_of(float x) { return exp2<5>(splat(x))[0]; }

inline void put(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(bits >> 16 | 0x40);
}
// Weights of two vectors, as the second product wants them.
inline void put_weights(float* to, F a, F b) {
  store(to, a);
  store(to + kLanes<float>, b);
}
inline void put_weights(bf16* to, F a, F b) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  std::memcpy(static_cast<void*>(to), &both, sizeof both);
#else
  store(to, a);
  store(to + kLanes<float>, b);
#endif
}

// n adjacent elements as E, then zeroes up to `padded`.
template <class E, class T>
inline void copy_row(const T* from, int64_t n, E* to, int64_t padded) {
  if constexpr (std::is_same_v<E, T>)
    std::memcpy(static_cast<void*>(to), from, size_t(n) * sizeof(E));
  else if constexpr (std::is_same_v<E, float>) {
    int64_t c = 0;
    for (; c + kLanes<float> <= n; c += kLanes<float>) store(to + c, load(from + c));
    for (; c < n; ++c) to[c] = to_float(from[c]);
  } else {
    for (int64_t c = 0; c < n; ++c) put(to + c, to_float(from[c]));
  }
  std::memset(static_cast<void*>(to + n), 0, size_t(padded - n) * sizeof(E));
}

// Packs B (tile.h) from rows of T, `stride` apart: element (k, n) is column k of row n. Sixteen rows at a time, first
// brought to E, then read in columns of `group` elements.
template <class Engine, class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, typename Engine::Element* to,
                     int64_t depth, int64_t n) {
  typedef typename Engine::Element E;
  typedef std::conditional_t<sizeof(E) * Engine::kGroup == 4, uint32_t, E> Unit;
  constexpr int g = Engine::kGroup;
  const int64_t units = depth / g;
  std::vector<E> lines(size_t(16 * depth));
  for_panels<Engine>(int(n), [&](int at, int width) {
    for (int r0 = 0; r0 < width; r0 += 16) {
      const int count = std::min(16, width - r0);
      for (int r = 0; r < count; ++r)
        copy_row(from + (at + r0 + r) * stride, at + r0 + r < rows ? columns : 0, &lines[size_t(r * depth)], depth);
      for (int64_t u = 0; u < units; ++u) {
        Unit line[16];
        for (int r = 0; r < count; ++r) std::memcpy(&line[r], &lines[size_t(r * depth + u * g)], sizeof(Unit));
        std::memcpy(static_cast<void*>(to + at * depth + (u * width + r0) * g), line, size_t(count) * sizeof(Unit));
      }
    }
  });
}

// Packs B from rows of T: element (k, n) is column n of row k.
template <class Engine, class T>
void pack_values(const T* from, int64_t stride, int64_t rows, int64_t columns, typename Engine::Element* to,
                 int64_t depth, int64_t n) {
  typedef typename Engine::Element E;
  constexpr int g = Engine::kGroup;
  std::vector<E> lines(size_t(g * n));
  for (int64_t k = 0; k < depth; k += g) {
    for (int i = 0; i < g; ++i)
      copy_row(from + (k + i) * stride, k + i < rows ? columns : 0, &lines[size_t(i * n)], n);
    for_panels<Engine>(int(n), [&](int at, int width) {
      E* line = to + at * depth + k * width;
      for (int c = 0; c < width; ++c)
        for (int i = 0; i < g; ++i) line[c * g + i] = lines[size_t(i * n + at + c)];
    });
  }
}

template <class Engine>
class Worker {
  typedef typename Engine::Element E;
  static constexpr bool kSplit = !std::is_same_v<E, float>;  // weights live apart from the fp32 scores
  static constexpr int kTerms = kSplit ? 3 : 5, L = kLanes<float>;

 public:
  static constexpr int kRows = Engine::kBlockRows;

  explicit Worker(const Problem& p)
      : p_(p),
        depth_(up(p.depth, Engine::kDepth)),
        width_(up(p.width, Engine::kColumns)),
        stretch_(std::max<int64_t>(kKeys, kStretchBytes / int64_t(sizeof(E)) / (depth_ + width_) / kKeys * kKeys)) {
    stretch_ = std::min(stretch_, up(p.keys, kKeys));
    k_.reset(new E[size_t(stretch_ * depth_)]);
    v_.reset(new E[size_t(stretch_ * width_)]);
    q_.reset(new E[size_t(kRows * depth_)]);
    scores_.reset(new float[size_t(kRows * kKeys)]);
    if (kSplit) weights_.reset(new E[size_t(kRows * kKeys)]);
  }

  // Query blocks [first, last) of one head.
  template <class T>
  void run(int64_t b, int64_t h, int64_t first, int64_t last, T* out) {
    const bool whole = p_.keys <= stretch_;  // then a block of queries is finished before the next begins
    reserve(whole ? 1 : last - first);
    const int64_t kv = h / (p_.heads / p_.kv_heads);
    const T* k = data<T>(p_.k) + b * p_.k.stride(0) + kv * p_.k.stride(2);
    const T* v = data<T>(p_.v) + b * p_.v.stride(0) + kv * p_.v.stride(2);
    const T* q = data<T>(p_.q) + b * p_.q.stride(0) + h * p_.q.stride(2);
    const int64_t seen = p_.visible(std::min(last * kRows, p_.queries) - 1);
    for (int64_t at = 0; at < seen; at += stretch_) {
      const int64_t keys = std::min(stretch_, seen - at);
      pack(k + at * p_.k.stride(1), v + at * p_.v.stride(1), keys);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i * kRows, rows = std::min<int64_t>(kRows, p_.queries - row);
        if (!whole && p_.visible(row + rows - 1) <= at) continue;
        for (int64_t r = 0; r < up(rows, Engine::kRows); ++r)
          copy_row(q + (row + r) * p_.q.stride(1), r < rows ? p_.depth : 0, &q_[size_t(r * depth_)], depth_);
        visit(b, h, row, int(rows), at, keys, whole ? 0 : i - first);
        if (!whole) continue;
        finish(b, h, row, 0, out);
        restart();
      }
    }
    if (!whole || seen == 0)
      for (int64_t i = first; i < last; ++i) finish(b, h, i * kRows, whole ? 0 : i - first, out);
  }

 private:
  void reserve(int64_t blocks) {
    const size_t rows = size_t(blocks * kRows);
    if (rows > top_.size()) {
      top_.resize(rows);
      total_.resize(rows * size_t(L));
      out_.reset(new float[rows * size_t(width_)]);
    }
    started_.resize(size_t(blocks));
    restart();
  }

  void restart() {
    std::fill(top_.begin(), top_.end(), kNone);
    std::fill(total_.begin(), total_.end(), 0.0f);
    std::fill(started_.begin(), started_.end(), char(0));
  }

  template <class T>
  void pack(const T* k, const T* v, int64_t keys) {
    for (int64_t at = 0; at < keys; at += kKeys) {
      const int64_t n = std::min<int64_t>(kKeys, keys - at), padded = padded_keys(n);
      pack_transposed<Engine>(k + at * p_.k.stride(1), p_.k.stride(1), n, p_.depth, &k_[size_t(at * depth_)], depth_,
                              padded);
      pack_values<Engine>(v + at * p_.v.stride(1), p_.v.stride(1), n, p_.width, &v_[size_t(at * width_)], padded,
                          width_);
    }
  }

  static int64_t padded_keys(int64_t n) { return up(n, std::max(2 * L, Engine::kDepth)); }

  // All keys of the stretch that starts at key `at`, for one block of queries.
  void visit(int64_t b, int64_t h, int64_t row, int rows, int64_t at, int64_t keys, int64_t slot) {
    const int m = int(up(rows, Engine::kRows));
    float* out = &out_[size_t(slot * kRows * width_)];
    for (int64_t j = 0; j < keys && at + j < p_.visible(row + rows - 1); j += kKeys) {
      const int n = int(std::min<int64_t>(kKeys, keys - j)), padded = int(padded_keys(n));
      Engine::multiply(q_.get(), int(depth_), &k_[size_t(j * depth_)], scores_.get(), kKeys, m, padded, int(depth_),
                       false);
      const bool masked = mask(b, h, row, rows, at + j, n, padded);
      for (int r = 0; r < rows; ++r) update(r, padded, masked ? 1.0f : float(p_.scale) * kLog2e, slot);
      Engine::multiply(weights(), kKeys, &v_[size_t(j * width_)], out, int(width_), m, int(width_), padded,
                       started_[size_t(slot)]);
      started_[size_t(slot)] = 1;
    }
  }

  E* weights() {
    if constexpr (kSplit)
      return weights_.get();
    else
      return scores_.get();
  }

  // Hides what is not to be seen and adds the bias. Returns whether the scores are now in units of ln 2.
  bool mask(int64_t b, int64_t h, int64_t row, int rows, int64_t key, int n, int padded) {
    const bool hides = p_.visible(row) < key + n;
    const bool scaled = p_.bias.has_value() || hides || p_.scale <= 0;
    if (!scaled) {
      for (int r = 0; r < rows && n < padded; ++r)
        std::fill(&scores_[size_t(r * kKeys + n)], &scores_[size_t(r * kKeys)] + padded, kNone);
      return false;
    }
    for (int r = 0; r < rows; ++r) {
      float* line = &scores_[size_t(r * kKeys)];
      for (int j = 0; j < n; ++j) line[j] *= float(p_.scale) * kLog2e;
      if (p_.bias.has_value()) add_bias(line, b, h, row + r, key, n);
      const int64_t seen = std::max<int64_t>(0, std::min<int64_t>(n, p_.visible(row + r) - key));
      for (int64_t j = seen; j < padded; ++j) line[j] = kNone;
    }
    return true;
  }

  void add_bias(float* line, int64_t b, int64_t h, int64_t row, int64_t key, int n) const {
    const Tensor& t = *p_.bias;
    const auto step = [&](int64_t d, int64_t i) { return t.size(d) == 1 ? 0 : i * t.stride(d); };
    const int64_t at = step(0, b) + step(1, h) + step(2, row) + step(3, key), next = step(3, 1);
    dispatch(t, [&](auto tag) {
      const auto* from = data<decltype(tag)>(t) + at;
      for (int j = 0; j < n; ++j) line[j] += float(to_float(from[j * next])) * kLog2e;
      return 0;
    });
  }

  // One row: new maximum, weights, running sum; scales what was summed before if the maximum rose.
  void update(int r, int padded, float unit, int64_t slot) {
    const size_t index = size_t(slot * kRows + r);
    float* line = &scores_[size_t(r * kKeys)];
    F highest = load(line);
    for (int j = L; j < padded; j += L) highest = max(highest, load(line + j));
    const float old = top_[index], now = std::max(old, max(highest) * unit);
    const float base = now == kNone ? 0.0f : now;
    F total = load(&total_[index * size_t(L)]);
    if (now > old && old != kNone) {
      const float shrink = exp2_of(old - base);
      total *= shrink;
      float* out = &out_[index * size_t(width_)];
      for (int64_t c = 0; c < width_; c += L) store(out + c, load(out + c) * shrink);
    }
    top_[index] = now;
    E* to = weights() + r * kKeys;
    for (int j = 0; j < padded; j += 2 * L) {
      const F a = exp2<kTerms>(load(line + j) * unit - base), b = exp2<kTerms>(load(line + j + L) * unit - base);
      total += a + b;
      put_weights(to + j, a, b);
    }
    store(&total_[index * size_t(L)], total);
  }

  template <class T>
  void finish(int64_t b, int64_t h, int64_t row, int64_t slot, T* out) {
    const int64_t rows = std::min<int64_t>(kRows, p_.queries - row), w = p_.width;
    for (int64_t r = 0; r < rows; ++r) {
      const size_t index = size_t(slot * kRows + r);
      const float total = sum(load(&total_[index * size_t(L)]));
      const float inverse = total == 0 ? 0.0f : 1 / total;
      const float* from = &out_[index * size_t(width_)];
      T* to = out + ((b * p_.queries + row + r) * p_.heads + h) * w;
      if (!started_[size_t(slot)]) {
        std::fill(to, to + w, T{});
        continue;
      }
      int64_t c = 0;
      for (; c + L <= w; c += L) store(to + c, load(from + c) * inverse);
      if (c < w) store(to + c, load(from + c) * inverse, int(w - c));
    }
  }

  const Problem& p_;
  int64_t depth_, width_, stretch_;
  std::unique_ptr<E[]> k_, v_, q_, weights_;
  std::unique_ptr<float[]> scores_, out_;
  std::vector<float> top_, total_;
  std::vector<char> started_;
  [[maybe_unused]] typename Engine::Scope scope_;
};

template <class Engine, class T>
void run_tiled(const Problem& p, T* out) {
  typedef Worker<Engine> W;
  const int64_t blocks = (p.queries + W::kRows - 1) / W::kRows;
  parallel_for(0, p.batch * p.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    W worker(p);
    for (int64_t task = begin; task < end;) {
      const int64_t head = task / blocks, stop = std::min(end, (head + 1) * blocks);
      worker.run(head / p.heads, head % p.heads, task - head * blocks, stop - head * blocks, out);
      task = stop;
    }
  });
}

// fp64, for tests and scores of small models: one query at a time.
void run_double(const Problem& p, double* out) {
  const auto at = [](const Tensor& t, int64_t b, int64_t i, int64_t h) {
    return data<double>(t) + b * t.stride(0) + i * t.stride(1) + h * t.stride(2);
  };
  parallel_for(0, p.batch * p.queries * p.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> weights(static_cast<size_t>(p.keys)), part(static_cast<size_t>(p.width + 1));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % p.heads, i = task / p.heads % p.queries, b = task / p.heads / p.queries;
      const int64_t kv = h / (p.heads / p.kv_heads), seen = p.visible(i);
      const double* q = at(p.q, b, i, h);
      double top = -std::numeric_limits<double>::infinity(), total = 0;
      for (int64_t j = 0; j < seen; ++j) {
        const double* k = at(p.k, b, j, kv);
        double score = 0;
        for (int64_t d = 0; d < p.depth; ++d) score += q[d] * k[d];
        score *= p.scale;
        if (p.bias.has_value()) {
          const Tensor& t = *p.bias;
          const int64_t index[4] = {b, h, i, j};
          int64_t offset = 0;
          for (int d = 0; d < 4; ++d) offset += t.size(d) == 1 ? 0 : index[d] * t.stride(d);
          score += dispatch(t, [&](auto tag) { return double(to_float(data<decltype(tag)>(t)[offset])); });
        }
        weights[size_t(j)] = score;
        top = std::max(top, score);
      }
      double* to = out + task * p.width;
      std::fill(to, to + p.width, 0.0);
      if (top == -std::numeric_limits<double>::infinity()) continue;
      for (int64_t first = 0; first < seen; first += 64) {  // sums of blocks round less than one long sum
        std::fill(part.begin(), part.end(), 0.0);
        for (int64_t j = first; j < std::min(seen, first + 64); ++j) {
          const double w = std::exp(weights[size_t(j)] - top), *v = at(p.v, b, j, kv);
          part.back() += w;
          for (int64_t d = 0; d < p.width; ++d) part[size_t(d)] += w * v[d];
        }
        total += part.back();
        for (int64_t d = 0; d < p.width; ++d) to[d] += part[size_t(d)];
      }
      for (int64_t d = 0; d < p.width; ++d) to[d] /= total;
    }
  });
}

Tensor unit_stride(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace

Tensor attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& bias, double scale,
                 bool causal, int64_t block_size) {
  const Tensor q = unit_stride(q_), k = unit_stride(k_), v = unit_stride(v_);
  const Problem p{q, k, v, bias, scale, causal, block_size};
  LDMFAST_CHECK(block_size > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0 && k.size(3) == p.depth &&
                    k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                "attention: shapes or dtypes of q, k and v do not fit");
  Tensor out = empty_in(q, {p.batch, p.queries, p.heads, p.width}, false);
  if (p.batch * p.queries * p.heads * p.width == 0) return out;
  switch (q.scalar_type()) {
    case ScalarType::BFloat16: run_tiled<Bf16Engine>(p, mutable_data<bf16>(out)); break;
    case ScalarType::Half: run_tiled<Fma>(p, mutable_data<f16>(out)); break;
    case ScalarType::Float: run_tiled<Fma>(p, mutable_data<float>(out)); break;
    case ScalarType::Double: run_double(p, mutable_data<double>(out)); break;
    default: LDMFAST_CHECK(false, "attention takes float32, bfloat16, float16 and float64");
  }
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(attention)
