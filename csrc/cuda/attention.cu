// attention: softmax(scale q k^T) v on the tensor cores, for the head dimensions that gain from kernels of their own.
//
// attention_mma.cuh: sm_80 and up, depths 40, 72, 80, 160 at their true size. attention_wgmma.cuh: sm_90a, those and 64
// and 128. Registered as `attention_cuda`: ldmfast/ops/attention.py says which calls come here.
#include "common/layout.h"
#include "common/stable.h"
#include "common/tensor.cuh"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_wgmma.cuh"

namespace ldmfast::cuda {
namespace {

enum Kernel : int64_t { kMma = 0, kWgmma = 1 };

struct Call {
  const Tensor &q, &k, &v;
  AttentionArguments arguments;
  int device;
  cudaStream_t stream;
};

// Blocks may use more than 48 KB of shared memory only once the kernel has asked for it.
template <class K, class... A>
void start(K kernel, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream, const A&... arguments) {
  LDMFAST_CHECK(blocks < (int64_t(1) << 31), "attention: too many queries and heads for one CUDA launch");
  LDMFAST_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) == cudaSuccess,
                "attention: this GPU gives a block too little shared memory");
  kernel<<<unsigned(blocks), threads, size_t(shared_bytes), stream>>>(arguments...);
  LDMFAST_CHECK(cudaGetLastError() == cudaSuccess, "attention: the kernel did not start");
}

template <class T, int D>
void run_mma(const Call& call) {
  using Tile = MmaTile<D>;
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call.device);
  const AttentionSizes& sizes = call.arguments.sizes;
  const int warps = mma_warps(sizes, Tile::rows(1), Tile::warps, processors);
  start(mma_kernel<T, D>, attention_blocks(sizes, Tile::rows(warps)), warps * 32, Tile::shared_bytes(warps), call.stream,
        call.arguments);
}

// The driver's encoder, asked for at run time: the library must load where there is no driver.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

template <class T>
CUtensorMap tensor_map(const Tensor& t, int rows) {
  const auto encode = tensor_map_encoder();
  LDMFAST_CHECK(encode != nullptr, "attention: this driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
  const TensorBox b = tensor_box(sizes_of(t).data(), strides_of(t).data(), sizeof(T), rows);
  LDMFAST_CHECK(fits_tensor_map(b), "attention: no tensor map takes these strides");
  const cuuint64_t size[4] = {b.size[0], b.size[1], b.size[2], b.size[3]};
  const cuuint64_t stride[3] = {b.stride[0], b.stride[1], b.stride[2]};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult made = encode(&map, type, 4, const_cast<void*>(t.const_data_ptr()), size, stride, b.box, step,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LDMFAST_CHECK(made == CUDA_SUCCESS, "attention: the driver refuses a tensor map");
  return map;
}

template <class T, int D>
void run_wgmma(const Call& call) {
  using Tile = WgmmaTile<D>;
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, call.device);
  LDMFAST_CHECK(major == 9, "attention: wgmma needs compute capability 9.0");
  start(wgmma_kernel<T, D>, attention_blocks(call.arguments.sizes, Tile::rows), kWgmmaThreads, Tile::shared_bytes,
        call.stream, tensor_map<T>(call.q, Tile::rows), tensor_map<T>(call.k, Tile::keys),
        tensor_map<T>(call.v, Tile::keys), call.arguments);
}

template <class T>
void run(const Call& call, int64_t kernel) {
  const int64_t depth = call.q.size(3);
  if (kernel == kMma) switch (depth) {
      case 40: return run_mma<T, 40>(call);
      case 72: return run_mma<T, 72>(call);
      case 80: return run_mma<T, 80>(call);
      case 160: return run_mma<T, 160>(call);
    }
  if (kernel == kWgmma) switch (depth) {
      case 40: return run_wgmma<T, 40>(call);
      case 64: return run_wgmma<T, 64>(call);
      case 72: return run_wgmma<T, 72>(call);
      case 80: return run_wgmma<T, 80>(call);
      case 128: return run_wgmma<T, 128>(call);
      case 160: return run_wgmma<T, 160>(call);
    }
  LDMFAST_CHECK(false, "attention: no CUDA kernel for this head dimension");
}

}  // namespace

// q: (batch, queries, heads, D); k, v: (batch, keys, kv_heads, D); out: (batch, queries, heads, D), dense.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal, int64_t block_size,
                 int64_t kernel) {
  const DeviceGuard guard(q.get_device_index());
  const Tensor out = empty_in(q, sizes_of(q), false);
  if (out.numel() == 0) return out;
  bool fits = scale > 0 && block_size > 0 && k.size(2) > 0 && q.size(2) % k.size(2) == 0 && v.size(3) == q.size(3);
  for (const Tensor* t : {&q, &k, &v}) {
    fits = fits && t->size(3) == q.size(3) && t->stride(3) == 1 && t->scalar_type() == q.scalar_type() &&
           reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0;
    for (int i = 0; i < 3; ++i) fits = fits && (t->size(i) == 1 || t->stride(i) % 8 == 0);
  }
  LDMFAST_CHECK(fits, "attention: the CUDA kernels take rows on 16 bytes, one depth for q, k and v, and a scale above 0");
  AttentionArguments a;
  a.sizes = {q.size(0), q.size(1), k.size(1), q.size(2), q.size(2) / k.size(2), causal, block_size};
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr(), a.out = out.mutable_data_ptr();
  for (int i = 0; i < 3; ++i) a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i), a.v_stride[i] = v.stride(i);
  a.unit = float(scale * 1.4426950408889634);
  const Call call{q, k, v, a, q.get_device_index(), static_cast<cudaStream_t>(current_stream(q))};
  switch (type_of(q)) {
    case Parameter::kBFloat16: run<__nv_bfloat16>(call, kernel); break;
    case Parameter::kHalf: run<__half>(call, kernel); break;
    default: LDMFAST_CHECK(false, "attention: the CUDA kernels take bfloat16 and float16");
  }
  return out;
}

}  // namespace ldmfast::cuda

LDMFAST_CUDA_PART_KERNEL(attention)
