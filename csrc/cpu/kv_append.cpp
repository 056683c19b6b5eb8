// kv_append: the rows of new tokens go into a cache, each at the position that is told for it.
#include <cstring>

#include "common/dispatch.h"
#include "common/token_rows.h"

namespace LDMFAST_LEVEL_NAMESPACE {

void kv_append(const Tensor& cache, const Tensor& new_rows, const Tensor& positions, bool ring) {
  const Tensor given = has_whole_rows(new_rows) ? new_rows : torch::stable::contiguous(new_rows);
  const TokenRows to = token_rows(cache), from = token_rows(given);
  LDMFAST_CHECK(has_whole_rows(cache), "kv_append: a token's numbers in the cache are adjacent");
  LDMFAST_CHECK(to.batch == from.batch && to.bytes == from.bytes && cache.scalar_type() == given.scalar_type(),
                "kv_append: cache and new are of one batch, row and dtype");
  LDMFAST_CHECK(positions.dim() == 2 && positions.size(1) == from.tokens && positions.element_size() == 8 &&
                    (positions.size(0) == 1 || positions.size(0) == from.batch),
                "kv_append: one int64 position for each token");
  const int64_t rows = from.batch * from.tokens;
  if (rows * from.bytes == 0) return;
  const Positions place(positions);
  char* const target = mutable_data<char>(cache);
  const char* const source = data<char>(given);
  parallel_for(0, rows, grain(from.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / from.tokens, t = i % from.tokens, row = row_at(place.at(b, t), to.tokens, ring);
      if (row < 0) continue;
      std::memcpy(target + b * to.batch_step + row * to.token_step, source + b * from.batch_step + t * from.token_step,
                  size_t(from.bytes));
    }
  });
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(kv_append)
