// Steps of attention for which every query sees every key, on the tile unit: scores S^T = K Q^T, their weights P^T, and
// O^T += V^T P^T, for 32 queries.
//
// The scores of 32 keys are summed while the weights of the 32 before them are made, in the order of the instructions,
// since the core does not look far enough ahead. Only so many scores are ever held: what the first-level cache cannot
// keep beside them, tile loads wait for (docs/performance.md, "Attention").
#pragma once

#include "pack.h"
#include "weights.h"

namespace LDMFAST_LEVEL_NAMESPACE {

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
struct TileSteps {
  static constexpr int kKeys = 32, C = Amx::kColumns;  // keys of a part

  const bf16 *k, *v, *q;  // packed (attention.cpp); k and v from the first key on
  int64_t depth, width, step;
  float* scores;  // two parts
  bf16* weights;  // one step
  float* out;     // (width, C)
  RowsAhead (&ahead)[2];  // asked for meanwhile

  // `pairs`: of keys whose weights are made beside one product. `sums`: the weights are added to `total`, too.
  template <int pairs, bool sums>
  void run(int64_t steps, bool started, const float* base, float unit, float* total) const {
    const int64_t parts = step / kKeys, all = steps * parts;
    const int64_t lines[2] = {ahead[0].lines() / all + 1, ahead[1].lines() / all + 1};
    Beside<pairs, sums> beside{TileWeights(base, unit), scores, weights, 0};
    multiply_keys(k, scores, beside);
    for (int64_t part = 0; part < all; ++part) {
      beside.from = scores + part % 2 * kKeys * C;
      beside.to = weights + part % parts * kKeys * C;
      beside.left = kKeys / 2;
      if (part + 1 < all) multiply_keys(k + (part + 1) * kKeys * depth, scores + (part + 1) % 2 * kKeys * C, beside);
      beside.some(beside.left);
      for (int i = 0; i < 2; ++i) ahead[i].some(lines[i]);
      if ((part + 1) % parts != 0) continue;
      Amx::multiply(v + part / parts * step * width, step, 2, weights, out, int(width), int(step), started);
      started = true;
    }
    if (sums) beside.made.add_sums(total);
  }

 private:
  template <int pairs, bool sums>
  struct Beside {  // weights yet to be made
    TileWeights made;
    const float* from;
    bf16* to;
    int left;  // pairs of keys

    LDMFAST_INLINE void some(int n) {
      for (; n > 0 && left > 0; --n, --left, from += 2 * C, to += 2 * C) made.template pair<sums>(from, to);
    }
    LDMFAST_INLINE void operator()() {
#pragma GCC unroll 4
      for (int i = 0; i < pairs; ++i) some(1);
    }
  };

  // s (32 keys x 32 queries) = K Q^T; beside() is called after every product.
  template <class Beside>
  LDMFAST_INLINE void multiply_keys(const bf16* keys, float* s, Beside& beside) const {
    const bf16 *below = keys + 16 * depth, *queries = q;
    Amx::begin<0>(nullptr, false);
    Amx::begin<1>(nullptr, false);
    Amx::begin<2>(nullptr, false);
    Amx::begin<3>(nullptr, false);
    for (int64_t d = 0; d < depth; d += 32, keys += 512, below += 512, queries += Amx::kStepB) {
      Amx::load_tile<4>(keys, 64);
      Amx::load_tile<6>(queries, Amx::kBytes);
      Amx::dot<0, 4, 6>();
      beside();
      Amx::load_tile<7>(queries + 32, Amx::kBytes);
      Amx::dot<1, 4, 7>();
      beside();
      Amx::load_tile<5>(below, 64);
      Amx::dot<2, 5, 6>();
      beside();
      Amx::dot<3, 5, 7>();
      beside();
    }
    Amx::store_tile<0>(s, Amx::kBytes);
    Amx::store_tile<1>(s + 16, Amx::kBytes);
    Amx::store_tile<2>(s + 16 * C, Amx::kBytes);
    Amx::store_tile<3>(s + 16 * C + 16, Amx::kBytes);
  }
};
#endif

}  // namespace LDMFAST_LEVEL_NAMESPACE
