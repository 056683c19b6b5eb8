// lincomb: out[i] = sum_j table[row, j] * inputs[j][i]. table and row are read on the device, so that one captured
// graph serves every step; a column whose coefficient is zero is dropped before any of its tensor is read.
#include <vector>

#include "common/layout.h"
#include "common/lincomb_plan.h"
#include "common/stable.h"
#include "common/tensor.cuh"

namespace ldmfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;  // 2048 threads, all that a multiprocessor holds

struct Inputs {
  Parameter x[kMaxInputs];
  int count;
};

// table: (rows, inputs.count) with these strides; row: one int64, or null for row 0. out and every input: elements
// numbers in the same order. kUniform: every input has out's type T.
template <class T, int V, bool kUniform>
__global__ void __launch_bounds__(kThreads) lincomb_kernel(const double* table, int64_t row_stride, int64_t column_stride,
                                                           const int64_t* row, const __grid_constant__ Inputs inputs,
                                                           T* out, int64_t elements) {
  using A = Acc<T>;
  __shared__ A coefficients[kMaxInputs];
  __shared__ int which[kMaxInputs];
  __shared__ int found;
  if (threadIdx.x < unsigned(inputs.count))
    coefficients[threadIdx.x] =
        A(table[table_index(row == nullptr ? 0 : *row, threadIdx.x, row_stride, column_stride)]);
  __syncthreads();
  if (threadIdx.x == 0) found = drop_zeros(coefficients, which, inputs.count);
  __syncthreads();
  const int columns = found;
  const ElementSplit split = split_elements(elements, V);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const auto one = [&](int64_t i) {
    A total = 0;
    for (int j = 0; j < columns; ++j) total += coefficients[j] * inputs.x[which[j]].at(i, A(0));
    out[i] = from<T>(total);
  };
  for (int64_t g = thread; g < split.groups; g += int64_t(gridDim.x) * kThreads) {
    if constexpr (kUniform) {
      A total[V] = {};
#pragma unroll 4
      for (int j = 0; j < columns; ++j) {
        const Pack<T, V> x = load<V>(static_cast<const T*>(inputs.x[which[j]].data) + g * V);
#pragma unroll
        for (int k = 0; k < V; ++k) total[k] += coefficients[j] * to<A>(x.v[k]);
      }
      Pack<T, V> y;
#pragma unroll
      for (int k = 0; k < V; ++k) y.v[k] = from<T>(total[k]);
      store<V>(out + g * V, y);
    } else {
      one(g);
    }
  }
  if (thread < split.rest) one(split.rest_begin + thread);
}

struct Call {
  const Tensor& table;
  const int64_t* row;
  const Inputs& inputs;
  const Tensor& out;
  bool uniform, aligned;
};

template <class T>
void run(const Call& call) {
  constexpr int wide = 16 / sizeof(T);
  const int64_t elements = call.out.numel();
  const bool vectors = call.uniform && call.aligned;
  const auto kernel = vectors ? lincomb_kernel<T, wide, true> : lincomb_kernel<T, 1, false>;
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.out.get_device_index());
  int64_t blocks = ceil_divide(split_elements(elements, vectors ? wide : 1).groups, kThreads);
  if (blocks > int64_t(processors) * kBlocksPerProcessor) blocks = int64_t(processors) * kBlocksPerProcessor;
  if (blocks < 1) blocks = 1;
  kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(current_stream(call.out))>>>(
      static_cast<const double*>(call.table.const_data_ptr()), call.table.stride(0), call.table.stride(1), call.row,
      call.inputs, static_cast<T*>(call.out.mutable_data_ptr()), elements);
  LDMFAST_CHECK(cudaGetLastError() == cudaSuccess, "lincomb: the kernel did not start");
}

}  // namespace

Tensor lincomb(const Tensor& table, const OptionalTensor& row, const std::vector<Tensor>& inputs) {
  LDMFAST_CHECK(!inputs.empty() && int(inputs.size()) <= kMaxInputs, "lincomb takes 1 to 32 inputs on CUDA");
  const Tensor& first = inputs[0];
  const DeviceGuard guard(first.get_device_index());
  Tensor out = empty_in(first, sizes_of(first), is_channels_last(first));
  if (out.numel() == 0) return out;
  std::vector<Tensor> dense;  // in out's order; keeps copies alive until they are queued
  Inputs list{};
  bool uniform = true, aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0;
  const Sizes order = is_channels_last(first) ? channels_last(size_t(first.dim())) : row_major(size_t(first.dim()));
  for (const Tensor& x : inputs) {
    if (is_dense(x, order)) {
      dense.push_back(x);
    } else {
      dense.push_back(empty_strided(x, sizes_of(x), strides_of(out)));
      torch::stable::copy_(dense.back(), x);
    }
    Parameter& p = list.x[list.count++];
    p.data = dense.back().const_data_ptr();
    p.type = type_of(x);
    p.stride = 1;
    uniform = uniform && x.scalar_type() == first.scalar_type();
    aligned = aligned && reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
  }
  const Call call{table, row.has_value() ? static_cast<const int64_t*>(row->const_data_ptr()) : nullptr, list, out,
                  uniform, aligned};
  switch (type_of(first)) {
    case Parameter::kBFloat16: run<__nv_bfloat16>(call); break;
    case Parameter::kHalf: run<__half>(call); break;
    case Parameter::kDouble: run<double>(call); break;
    default: run<float>(call);
  }
  return out;
}

}  // namespace ldmfast::cuda

LDMFAST_CUDA_KERNEL(lincomb)
