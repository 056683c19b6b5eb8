// What attention computes, and the plain way to compute it.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {

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

// fp64, for tests and scores of small models: one query at a time.
inline void run_double(const Problem& p, double* out) {
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

}  // namespace LDMFAST_LEVEL_NAMESPACE
