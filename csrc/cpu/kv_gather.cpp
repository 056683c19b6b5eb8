// kv_gather: rows of a cache by position, of batch elements by number.
#include <cstring>

#include "common/dispatch.h"
#include "common/token_rows.h"

namespace LDMFAST_LEVEL_NAMESPACE {

Tensor kv_gather(const Tensor& cache, const Tensor& positions, const OptionalTensor& source, bool ring) {
  const Tensor kept = has_whole_rows(cache) ? cache : torch::stable::contiguous(cache);
  const TokenRows from = token_rows(kept);
  const int64_t batch = source.has_value() ? source->size(0) : from.batch, tokens = positions.size(1);
  LDMFAST_CHECK(positions.dim() == 2 && positions.element_size() == 8 &&
                    (positions.size(0) == 1 || positions.size(0) == batch),
                "kv_gather: int64 positions of one element or of each");
  LDMFAST_CHECK(!source.has_value() || (source->dim() == 1 && source->element_size() == 8),
                "kv_gather: source is a list of int64 numbers of batch elements");
  Sizes sizes = sizes_of(cache);
  sizes[0] = batch;
  sizes[1] = tokens;
  Tensor out = empty_in(kept, sizes, false);
  const int64_t rows = batch * tokens;
  if (rows * from.bytes == 0) return out;
  const Positions place(positions);
  const int64_t* const elements = source.has_value() ? data<int64_t>(*source) : nullptr;
  const int64_t step = source.has_value() ? source->stride(0) : 0;
  char* const target = mutable_data<char>(out);
  const char* const x = data<char>(kept);
  parallel_for(0, rows, grain(from.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, row = row_at(place.at(b, i % tokens), from.tokens, ring);
      const int64_t element = elements == nullptr ? b : elements[b * step];
      char* const to = target + i * from.bytes;
      if (row < 0 || element < 0 || element >= from.batch)
        std::memset(to, 0, size_t(from.bytes));
      else
        std::memcpy(to, x + element * from.batch_step + row * from.token_step, size_t(from.bytes));
    }
  });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(kv_gather)
