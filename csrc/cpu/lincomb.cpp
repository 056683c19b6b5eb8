// lincomb: out = sum_j table[row, j] * inputs[j]; an input whose coefficient is zero is not touched.
#include "common/dispatch.h"
#include "common/stable.h"

namespace LDMFAST_LEVEL_NAMESPACE {
namespace {

constexpr int64_t kBlock = 2048;  // the running sum stays in the first-level cache

// total[i] += c * in[i]; the first term sets instead of adding.
template <class A, class T>
void accumulate(A* total, const T* in, A c, int64_t n, bool first) {
  for (int64_t i = 0; i < n; ++i) {
    const A term = c * A(to_float(in[i]));
    total[i] = first ? term : total[i] + term;
  }
}

template <class A, class T>
std::enable_if_t<std::is_same_v<A, Acc<T>>> accumulate_fast(A* total, const T* in, A c, int64_t n, bool first) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>)
    store(total + i, first ? c * load(in + i) : load(total + i) + c * load(in + i));
  accumulate(total + i, in + i, c, n - i, first);
}
template <class A, class T>
std::enable_if_t<!std::is_same_v<A, Acc<T>>> accumulate_fast(A* total, const T* in, A c, int64_t n, bool first) {
  accumulate(total, in, c, n, first);
}

template <class A, class T>
void write(T* out, const A* total, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(out + i, load(total + i));
  if (i < n) store(out + i, load(total + i, int(n - i)), int(n - i));
}

template <class T>
void run(const std::vector<double>& coefficients, const std::vector<Tensor>& inputs, T* out, int64_t n) {
  using A = Acc<T>;
  parallel_for(0, (n + kBlock - 1) / kBlock, 8, [&](int64_t begin, int64_t end) {
    A total[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kBlock, size = n - at < kBlock ? n - at : kBlock;
      bool first = true;
      for (size_t j = 0; j < inputs.size(); ++j) {
        const A c = A(coefficients[j]);
        if (c == 0) continue;
        dispatch(inputs[j], [&](auto tag) {
          return accumulate_fast(total, data<decltype(tag)>(inputs[j]) + at, c, size, first), 0;
        });
        first = false;
      }
      if (first) std::memset(total, 0, sizeof total);
      write(out + at, total, size);
    }
  });
}

}  // namespace

Tensor lincomb(const Tensor& table, const OptionalTensor& row, std::vector<Tensor> inputs) {
  const int64_t index = row.has_value() ? *data<int64_t>(*row) : 0;
  LDMFAST_CHECK(index >= 0 && index < table.size(0), "lincomb: row ", index, " is not in the table");
  LDMFAST_CHECK(table.size(1) == int64_t(inputs.size()), "lincomb: one table column for each input");
  std::vector<double> coefficients;
  for (int64_t j = 0; j < table.size(1); ++j)
    coefficients.push_back(data<double>(table)[index * table.stride(0) + j * table.stride(1)]);
  const bool last = is_channels_last(inputs[0]);
  const Sizes sizes = sizes_of(inputs[0]), order = last ? channels_last(sizes.size()) : row_major(sizes.size());
  Tensor out = empty_in(inputs[0], sizes, last);
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  if (n == 0) return out;
  using torch::headeronly::MemoryFormat;
  for (Tensor& x : inputs) {
    if (is_dense(x, order)) continue;
    x = torch::stable::contiguous(x, !last ? MemoryFormat::Contiguous
                                           : sizes.size() == 4 ? MemoryFormat::ChannelsLast
                                                               : MemoryFormat::ChannelsLast3d);
  }
  dispatch(out, [&](auto tag) { return run(coefficients, inputs, mutable_data<decltype(tag)>(out), n), 0; });
  return out;
}

}  // namespace LDMFAST_LEVEL_NAMESPACE

LDMFAST_CPU_KERNEL(lincomb)
