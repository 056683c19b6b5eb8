// attention: softmax(scale * q k^T + bias) v, one visit of every key (Dao et al. 2022), queries as vector lanes.
//
// A task is a block of queries of one head. For a step of keys it makes S^T = K Q^T, the weights P^T = 2^(S^T - base)
// and O^T += V^T P^T, so that each query is one lane: no sum or maximum ever runs across lanes, K is read as it is and
// neither depth nor width is padded where the engine does not need it.
//
// `base` shifts the exponents of a query's weights. Any base gives the same quotient as long as nothing overflows and
// the weights that matter stay normal numbers, and those range over 2^+-126 in fp32 as in bf16. So there is no running
// maximum and nothing is rescaled: |q . k| <= |q| max|k| (Cauchy and Schwarz) bounds the scores beforehand, and base
// is that bound less 60. Should the largest weights of a query turn out too small after all (its sum tells, mostly
// after the first step), or should the bound not be a number of reasonable size, the block is done again with the true
// maximum, found in a sweep of its own. The base depends on the query and its head alone, so a result depends neither
// on threads nor on the batch.
#include <algorithm>
#include <atomic>

#include "common/attention_problem.h"
#include "common/pack.h"
#include "common/tile_steps.h"
#include "common/workspace.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr int64_t kStretchBytes = 1 << 20;  // packed keys and values that stay in the second-level cache
constexpr float kLog2e = 1.44269504f;
constexpr float kHeadroom = 60;     // log2 of the largest weight that the bound allows
constexpr float kBoundLimit = 16384;  // up to here a base is a whole number to 1/128, as TileWeights needs
const float kNone = -std::numeric_limits<float>::infinity();

template <class Engine>
class Worker {
  typedef typename Engine::Element E;
  static constexpr int G = Engine::kGroup, C = Engine::kColumns, L = kLanes<float>;
  static constexpr bool kSplit = G > 1;  // weights are not fp32 and live apart from the scores
  static constexpr int kPad = std::max(Engine::kRows, Engine::kDepth);  // keys are packed in multiples of this
  enum class Sweep { bounded, maxima, exact };  // with the bound as base; finding the maxima; with those as base

 public:
  static constexpr int kQueries = C;

  explicit Worker(const Problem& p)
      : p_(p),
        depth_(up(p.depth, Engine::kDepth)),
        width_(up(p.width, Engine::kRows)),
        ones_(width_ > p.width),
        step_(Engine::kTiles && width_ <= 128 ? 64 : 128),  // measured: tiles want the scores in the first-level cache
        unit_(std::max(float(std::abs(p.scale)) * kLog2e, 1e-30f)) {  // not 0: -inf must stay
    const int64_t fit = kStretchBytes / int64_t(sizeof(E)) / (depth_ + width_) / step_ * step_;
    stretch_ = std::min(std::max<int64_t>(fit, step_), up(p.keys, step_));
  }
  ~Worker() { Workspace::of_thread().shrink(); }

  // Query blocks [first, last) of one head.
  template <class T>
  void run(int64_t b, int64_t h, int64_t first, int64_t last, T* out) {
    const bool whole = p_.keys <= stretch_;  // then a block of queries is finished before the next begins
    reserve(whole ? 1 : last - first);
    const int64_t kv = h / (p_.heads / p_.kv_heads);
    const T* k = data<T>(p_.k) + b * p_.k.stride(0) + kv * p_.k.stride(2);
    const T* v = data<T>(p_.v) + b * p_.v.stride(0) + kv * p_.v.stride(2);
    const T* q = data<T>(p_.q) + b * p_.q.stride(0) + h * p_.q.stride(2);
    const int64_t seen = p_.visible(std::min(last * C, p_.queries) - 1);
    if (b != b_ || kv != kv_) packed_ = -1;
    b_ = b;
    h_ = h;
    kv_ = kv;
    if (packed_ < 0) longest_ = longest_row(k, p_.k.stride(1), p_.keys, p_.depth);
    const auto sweep = [&](Sweep kind, int64_t from, int64_t to) {
      for (int64_t at = 0; at < seen; at += stretch_) {
        const int64_t keys = std::min(stretch_, seen - at);
        if (packed_ != at || packed_keys_ != keys) pack(k + at * p_.k.stride(1), v + at * p_.v.stride(1), keys);
        packed_ = at;
        packed_keys_ = keys;
        for (int64_t i = from; i < to; ++i) {
          slot_ = i - from;
          row_ = i * C;
          rows_ = int(std::min<int64_t>(C, p_.queries - row_));
          if (kind != Sweep::bounded && !again_[size_t(slot_)]) continue;
          pack_queries(q);
          if (whole) look_ahead(q, out);
          if (at == 0) start(kind);
          if (kind != Sweep::bounded || !again_[size_t(slot_)]) visit(kind, at, keys);
        }
      }
    };
    for (int64_t from = first; from < last;) {
      const int64_t to = whole ? from + 1 : last;
      std::fill(again_.begin(), again_.end(), char(0));
      std::fill(started_.begin(), started_.end(), char(0));
      sweep(Sweep::bounded, from, to);
      bool again = false;
      for (slot_ = 0; slot_ < to - from; ++slot_) again |= distrusted((from + slot_) * C);
      if (again) {
        sweep(Sweep::maxima, from, to);
        sweep(Sweep::exact, from, to);
      }
      for (slot_ = 0; slot_ < to - from; ++slot_) finish((from + slot_) * C, out);
      from = to;
    }
  }

 private:
  // The next block's queries and this one's output are asked for while the keys are visited.
  template <class T>
  void look_ahead(const T* q, T* out) {
    const int64_t stride = p_.q.stride(1), next = std::min<int64_t>(C, p_.queries - row_ - C);
    ahead_[0] = next > 0 ? RowsAhead(q + (row_ + C) * stride, stride, next, p_.depth) : RowsAhead();
    ahead_[1] = RowsAhead(out_row(out, row_), p_.heads * p_.width, rows_, p_.width);
  }

  void reserve(int64_t slots) {
    if (slots <= int64_t(started_.size())) return;
    packed_ = -1;  // the workspace may move
    started_.resize(size_t(slots));
    again_.resize(size_t(slots));
    Workspace& w = Workspace::of_thread();
    w.lay_out([&] {
      k_ = w.take<E>(stretch_ * depth_);
      v_ = w.take<E>(stretch_ * width_);
      q_ = w.take<E>(depth_ * C);
      scores_ = w.take<float>(step_ * C);
      weights_ = kSplit ? w.take<E>(step_ * C) : nullptr;
      base_ = w.take<float>(slots * C);
      total_ = w.take<float>(slots * C);
      out_ = w.take<float>(slots * width_ * C);
    });
  }

  template <class T>
  T* out_row(T* out, int64_t row) const {
    return out + ((b_ * p_.queries + row) * p_.heads + h_) * p_.width;
  }

  E* weights() {
    if constexpr (kSplit)
      return weights_;
    else
      return scores_;
  }

  // Where A has element (row, k), of `depth` columns: row-major, or by whole tiles.
  static int64_t place(int64_t row, int64_t k, int64_t depth) {
    if (!Engine::kTiles) return row * depth + k;
    return row / 16 * 16 * depth + k / 32 * 512 + row % 16 * 32 + k % 32;
  }

  template <class T>
  void pack(const T* k, const T* v, int64_t keys) {
    const int64_t padded = up(keys, kPad);
    for (int64_t j = 0; j < padded; ++j) {
      if (j + kAhead < keys) prefetch<0>(k + (j + kAhead) * p_.k.stride(1), 0, 1, p_.depth);
      for (int64_t d = 0; d < depth_; d += L * G) {
        const int64_t n = j < keys ? std::min<int64_t>(L * G, p_.depth - d) : 0;
        const U line = n > 0 ? line_of<E>(k + j * p_.k.stride(1) + d, int(n)) : U{};
        store_dwords(k_ + place(j, d, depth_), line, int(std::min<int64_t>(L, (depth_ - d) / G)));
      }
    }
    prefetch<0>(v, p_.v.stride(1), std::min<int64_t>(step_, keys), p_.width);
    for (int64_t at = 0; at < padded; at += step_) {
      if (at + step_ < keys)
        prefetch<0>(v + (at + step_) * p_.v.stride(1), p_.v.stride(1), std::min<int64_t>(step_, keys - at - step_),
                    p_.width);
      pack_values(v + at * p_.v.stride(1), keys - at, std::min<int64_t>(step_, padded - at), v_ + at * width_);
    }
  }

  // One step of values as A of the second product: in groups of keys by columns, or by rows of keys for tiles. Where
  // the tiles have rows to spare, one holds ones: its product is the sum of the weights.
  template <class T>
  void pack_values(const T* v, int64_t keys, int64_t padded, E* to) const {
    const int64_t stride = p_.v.stride(1);
    const auto group = [&](int64_t j, int64_t c) {  // L columns of keys j to j + G
      const int n = int(std::min<int64_t>(L, p_.width - c));
      if constexpr (kSplit) {
        const auto half = [&](int64_t i) {
          return i < keys ? __builtin_convertvector(load_halves(v + i * stride + c, n), U) : U{};
        };
        return half(j) | half(j + 1) << 16;
      } else {
        return j < keys ? line_of<E>(v + j * stride + c, n) : U{};
      }
    };
    for (int64_t c = 0; c < p_.width; c += L) {
      if constexpr (Engine::kTiles) {
        for (int64_t j = 0; j < padded; j += 32) {
          U rows[L];
          for (int i = 0; i < 16; ++i) rows[i] = group(j + 2 * i, c);
          transpose(rows);
          for (int i = 0; i < 16; ++i) store_dwords(to + place(c + i, j, step_), rows[i], 16);
        }
      } else {
        const int n = int(std::min<int64_t>(L, p_.width - c));
        for (int64_t j = 0; j < padded; j += G) store_dwords(to + (j * width_ / G + c) * G, group(j, c), n);
      }
    }
    if constexpr (Engine::kTiles)
      for (int64_t j = 0; j < padded && ones_; ++j) to[place(p_.width, j, step_)] = {uint16_t(j < keys ? 0x3f80 : 0)};
  }

  // The block's queries as B of the first product, and their norms.
  template <class T>
  void pack_queries(const T* q) {
    const int64_t stride = p_.q.stride(1), units = depth_ / G;
    const U flip = U{} + (p_.scale < 0 ? (kSplit ? 0x80008000u : 0x80000000u) : 0u);
    for (int t = 0; t < C; t += L) {
      F squares{};
      for (int64_t u = 0; u < units; u += L) {
        const int n = int(std::min<int64_t>(L * G, p_.depth - u * G));
        U rows[L];
        for (int i = 0; i < L; ++i)
          rows[i] = t + i < rows_ && n > 0 ? line_of<E>(q + (row_ + t + i) * stride + u * G, n) ^ flip : U{};
        transpose(rows);
        for (int i = 0; i < L && u + i < units; ++i) {
          squares += square(rows[i], q_);
          store_dwords(q_ + ((u + i) * C + t) * G, rows[i], L);
        }
      }
      store(norms_ + t, squares);
    }
  }

  // Before a block meets its first key.
  void start(Sweep kind) {
    float *base = base_ + slot_ * C, *total = total_ + slot_ * C;
    started_[size_t(slot_)] = 0;
    std::fill(total, total + C, 0.0f);
    if (kind == Sweep::maxima) std::fill(base, base + C, kNone);
    if (kind == Sweep::exact)
      for (int i = 0; i < C; ++i) base[i] = base[i] == kNone ? 0.0f : std::nearbyint(base[i]);
    if (kind != Sweep::bounded) return;
    bool tame = true;
    for (int i = 0; i < C; ++i) {
      const float bound = std::sqrt(norms_[i]) * (longest_ * unit_ * 1.001f);
      tame &= bound <= kBoundLimit || i >= rows_;
      base[i] = bound <= kBoundLimit ? float(int(bound)) - kHeadroom : 0.0f;
    }
    again_[size_t(slot_)] = !tame;
  }

  // All keys of the stretch that starts at key `at`, for one block of queries.
  void visit(Sweep kind, int64_t at, int64_t keys) {
    const int64_t seen = std::min(keys, p_.visible(row_ + rows_ - 1) - at);
    float* out = out_ + slot_ * width_ * C;
    const bool trial = kind == Sweep::bounded && at == 0 && seen >= 8 * step_;
    int64_t j = 0;
    if constexpr (Engine::kTiles)
      if (kind == Sweep::bounded && !p_.bias.has_value()) {
        const int64_t steps = std::min(keys, p_.visible(row_) - at) / step_;
        if (trial && steps > 0) {
          j = visit_whole(0, 1, out);
          if (distrusted(row_)) return;
        }
        j = visit_whole(j, steps - j / step_, out);
      }
    for (RowsAhead& rows : ahead_) rows.some(rows.lines());
    for (; j < seen; j += step_) {
      if (trial && j == step_ && distrusted(row_)) return;
      const int n = int(std::min<int64_t>(step_, keys - j)), padded = int(up(n, kPad));
      Engine::multiply(k_ + j * depth_, depth_, G, q_, scores_, int(up(n, Engine::kRows)),
                       int(depth_), false);
      mask(scores_, at + j, n, padded);
      const float unit = p_.bias.has_value() ? 1.0f : unit_;
      if (kind == Sweep::maxima) {
        raise(scores_, padded, unit);
        continue;
      }
      weigh(kind, scores_, weights(), padded, unit);
      const E* v = v_ + j * width_;
      if constexpr (Engine::kTiles)
        Engine::multiply(v, step_, G, weights(), out, int(width_), padded, started_[size_t(slot_)]);
      else
        Engine::multiply(v, G, width_ * G, weights(), out, int(width_), padded, started_[size_t(slot_)]);
      started_[size_t(slot_)] = 1;
    }
  }

  // Steps from key j on of which nothing is hidden. Returns the key after them.
  int64_t visit_whole(int64_t j, [[maybe_unused]] int64_t steps, [[maybe_unused]] float* out) {
#if defined(__AMX_BF16__)
    if (steps <= 0) return j;
    TileSteps tiles{k_ + j * depth_, v_ + j * width_, q_, depth_, width_, step_, scores_, weights_, out, ahead_};
    const auto run = [&](auto run) {
      (tiles.*run)(steps, started_[size_t(slot_)], base_ + slot_ * C, unit_, total_ + slot_ * C);
    };
    if (depth_ <= 32)
      ones_ ? run(&TileSteps::run<4, false>) : run(&TileSteps::run<4, true>);
    else if (depth_ <= 96)
      ones_ ? run(&TileSteps::run<2, false>) : run(&TileSteps::run<2, true>);
    else
      ones_ ? run(&TileSteps::run<1, false>) : run(&TileSteps::run<1, true>);
    started_[size_t(slot_)] = 1;
    return j + steps * step_;
#else
    return j;
#endif
  }

  // Adds the bias, then also scaled and in units of ln 2, and hides what is not to be seen.
  void mask(float* s, int64_t key, int n, int padded) const {
    if (p_.bias.has_value()) add_bias(s, key, n);
    if (p_.visible(row_) < key + n) {
      float seen[C];
      for (int i = 0; i < C; ++i) seen[i] = float(p_.visible(row_ + std::min(i, rows_ - 1)) - key);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < C; ++i) s[j * C + i] = float(j) < seen[i] ? s[j * C + i] : kNone;
    }
    std::fill(s + n * C, s + padded * C, kNone);
  }

  void add_bias(float* s, int64_t key, int n) const {
    const Tensor& t = *p_.bias;
    const auto step = [&](int64_t d, int64_t i) { return t.size(d) == 1 ? 0 : i * t.stride(d); };
    const int64_t down = step(2, 1), right = step(3, 1);
    dispatch(t, [&](auto tag) {
      const auto* from = data<decltype(tag)>(t) + step(0, b_) + step(1, h_) + row_ * down + key * right;
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < C; ++i)
          s[j * C + i] = s[j * C + i] * unit_ +
                         (i < rows_ ? float(to_float(from[i * down + j * right])) * kLog2e : 0.0f);
      return 0;
    });
  }

  void raise(const float* s, int padded, float unit) {
    float* base = base_ + slot_ * C;
    for (int t = 0; t < C; t += L) {
      F top = load(base + t);
      for (int j = 0; j < padded; ++j) top = max(load(s + j * C + t) * unit, top);
      store(base + t, top);
    }
  }

  void weigh([[maybe_unused]] Sweep kind, float* s, E* weights, int padded, float unit) {
    const float* base = base_ + slot_ * C;
    float* total = total_ + slot_ * C;
#if defined(__AMX_BF16__)
    if constexpr (Engine::kTiles)
      if (kind == Sweep::bounded && !p_.bias.has_value()) {
        TileWeights made(base, unit);
        for (int j = 0; j < padded; j += 2) made.pair<true>(s + j * C, weights + j * C);
        if (!ones_) made.add_sums(total);
        return;
      }
#endif
    for (int t = 0; t < C; t += L) {
      const Weights weight(unit, load(base + t));
      F sum{};  // of this step: a sum of sums rounds less
      for (int j = 0; j < padded; j += G) {
        float* from = s + j * C + t;
        if constexpr (kSplit) {
          const F a = weight.rough(load(from)), b = weight.rough(load(from + C));
          sum += a + b;
          store_dwords(weights + (j * C + t * G), pair_rounded(a, b), L);
        } else {
          const F a = weight.exact(load(from));
          sum += a;
          store(from, a);
        }
      }
      store(total + t, load(total + t) + sum);
    }
  }

  const float* totals() const { return ones_ ? out_ + (slot_ * width_ + p_.width) * C : total_ + slot_ * C; }

  // Whether the weights are too small or too large for the sums to be exact: such a block is done again. Asked after the
  // first of many steps, too, whose keys are seldom all of a kind that the others are not.
  bool distrusted(int64_t row) {
    const int rows = int(std::min<int64_t>(C, p_.queries - row));
    bool fine = started_[size_t(slot_)] && !again_[size_t(slot_)];
    if (fine) {
      const float* total = totals();
      for (int i = 0; i < rows; ++i) fine &= total[i] >= 0x1p-100f && total[i] <= 0x1p80f;
    }
    again_[size_t(slot_)] = !fine;
    return !fine;
  }

  template <class T>
  void finish(int64_t row, T* out) {
    const int64_t w = p_.width, stride = p_.heads * w;
    const int rows = int(std::min<int64_t>(C, p_.queries - row));
    T* const to = out_row(out, row);
    if (!started_[size_t(slot_)]) {
      for (int r = 0; r < rows; ++r) std::fill(to + r * stride, to + r * stride + w, T{});
      return;
    }
    const float *total = totals(), *from = out_ + slot_ * width_ * C;
    constexpr int g = std::is_same_v<T, bf16> && kSplit ? 2 : 1;  // columns in a dword
    for (int t = 0; t < rows; t += L) {
      const F sum = load(total + t), inverse = sum == 0 ? F{} : 1 / sum;
      for (int64_t c = 0; c < w; c += L * g) {
        U lines[L];
        for (int i = 0; i < L; ++i) {
          const int64_t at = c + i * g;
          const auto row_of = [&](int64_t k) { return k < w ? load(from + k * C + t) * inverse : F{}; };
          if constexpr (g == 2)
            lines[i] = pair_rounded(row_of(at), row_of(at + 1));
          else
            lines[i] = (U)row_of(at);
        }
        transpose(lines);
        const int n = int(std::min<int64_t>(L * g, w - c));
        for (int i = 0; i < std::min(L, rows - t); ++i) {
          T* line = to + (t + i) * stride + c;
          if constexpr (g == 2)
            store_halves(line, lines[i], n);
          else if (n == L)
            store(line, (F)lines[i]);
          else
            store(line, (F)lines[i], n);
        }
      }
    }
  }

  const Problem& p_;
  int64_t depth_, width_;
  bool ones_;  // a row of V^T holds ones
  int step_;   // keys of one step
  float unit_;
  int64_t stretch_ = 0, b_ = -1, h_ = 0, kv_ = -1, row_ = 0, slot_ = 0;
  int64_t packed_ = -1, packed_keys_ = 0;  // first and number of the packed keys, of b_ and kv_
  int rows_ = 0;
  float longest_ = 0;
  float norms_[C];
  E *k_ = nullptr, *v_ = nullptr, *q_ = nullptr, *weights_ = nullptr;
  float *scores_ = nullptr, *base_ = nullptr, *total_ = nullptr, *out_ = nullptr;
  std::vector<char> started_, again_;
  RowsAhead ahead_[2];
  [[maybe_unused]] typename Engine::Scope scope_;
};

template <class Engine, class T>
void run_blocks(const Problem& p, T* out) {
  typedef Worker<Engine> W;
  const int64_t blocks = (p.queries + W::kQueries - 1) / W::kQueries;
  // A thread has tasks of its own, far from the others' in memory, and then takes over what one that is held up has left.
  const int64_t heads = p.batch * p.heads, threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t parts = std::clamp<int64_t>((4 * threads + heads - 1) / heads, 1, blocks), tasks = heads * parts;
  std::vector<std::atomic<int64_t>> next(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; ++t) next[size_t(t)] = t * tasks / threads;
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    W worker(p);
    for (int64_t t = begin; t < begin + threads; ++t) {
      const int64_t owner = t % threads, stop = (owner + 1) * tasks / threads;
      for (int64_t task; (task = next[size_t(owner)]++) < stop;) {
        const int64_t head = task / parts, part = task % parts;
        worker.run(head / p.heads, head % p.heads, part * blocks / parts, (part + 1) * blocks / parts, out);
      }
    }
    (void)end;  // whose tasks are taken over in turn
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
    case ScalarType::BFloat16: run_blocks<Bf16Engine>(p, mutable_data<bf16>(out)); break;
    case ScalarType::Half: run_blocks<Fma>(p, mutable_data<f16>(out)); break;
    case ScalarType::Float: run_blocks<Fma>(p, mutable_data<float>(out)); break;
    case ScalarType::Double: run_double(p, mutable_data<double>(out)); break;
    default: LDMFAST_CHECK(false, "attention takes float32, bfloat16, float16 and float64");
  }
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(attention)
