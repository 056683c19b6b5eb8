// The only file that includes torch/csrc/stable: tensors, boxing and registration under the LibTorch stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "isa.h"

#if TORCH_TARGET_VERSION != 0x020a000000000000
#error "compile with -DTORCH_TARGET_VERSION=0x020a000000000000: one library must serve every torch from 2.10 on"
#endif

// From torch 2.11 on; older ones leave it null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace ldmfast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a registered function may take and give. float and int compile but arrive as garbage, because a boxed value
// is copied as 64 bits of a double or an int64.
template <class T>
constexpr bool is_boxable = std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor> ||
                            std::is_same_v<T, std::vector<Tensor>> || std::is_same_v<T, double> ||
                            std::is_same_v<T, int64_t> || std::is_same_v<T, bool> ||
                            std::is_same_v<T, std::optional<double>> || std::is_same_v<T, std::optional<int64_t>>;

template <class R>
constexpr bool is_result = is_boxable<R> || std::is_void_v<R>;
template <class... R>
constexpr bool is_result<std::tuple<R...>> = (is_boxable<R> && ...);

template <class>
struct Signature;
template <class R, class... A>
struct Signature<R(A...)> {
  static constexpr bool boxable = is_result<R> && (is_boxable<std::decay_t<A>> && ...);
};

template <auto fn>
struct Box {
  using Function = std::remove_pointer_t<decltype(fn)>;
  static_assert(Signature<Function>::boxable,
                "an op takes and returns Tensor, optional Tensor, list of Tensor, double, int64_t or bool only: "
                "float and int would receive garbage under the stable ABI");
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    torch::stable::detail::boxer<Function, fn>::boxed_fn(stack, inputs, outputs);
  }
};
#define LDMFAST_BOX(fn) (&::ldmfast::Box<fn>::call)

// For what Python has already ruled out. Below torch 2.13 the text is lost on the way.
#define LDMFAST_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }
inline Sizes strides_of(const Tensor& t) { return Sizes(t.strides().begin(), t.strides().end()); }

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

constexpr size_t kLargeBlock = size_t(16) << 20;  // bytes: what glibc may take fresh from the kernel

// A block's memory as a tensor; false where there is none to be had.
inline bool take_block(size_t bytes, const Sizes& sizes, const Sizes& strides, int32_t dtype, int32_t device_index,
                       AtenTensorHandle* made) {
  if (torch_from_blob == nullptr) return false;
  size_t size = 0;
  void* const memory = Blocks::all().take(bytes, size);
  if (memory == nullptr) return false;
  const auto give = [](void* data, void* context) { Blocks::all().give(data, reinterpret_cast<size_t>(context)); };
  if (torch_from_blob(memory, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype,
                      aoti_torch_device_type_cpu(), device_index, made, aoti_torch_layout_strided(), nullptr, 0, give,
                      reinterpret_cast<void*>(size)) == AOTI_TORCH_SUCCESS)
    return true;
  Blocks::all().give(memory, size);
  return false;
}

// Bytes of a tensor without gaps, as all that is made here is.
inline size_t bytes_of(const Sizes& sizes, int32_t dtype) {
  size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (const int64_t n : sizes) bytes *= size_t(n);
  return bytes;
}

// New memory on t's device; the plain shim call boxes nothing, so it is cheaper than torch::stable::empty.
inline Tensor empty_strided(const Tensor& t, const Sizes& sizes, const Sizes& strides, int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle handle;
  const size_t bytes = bytes_of(sizes, dtype);
  const bool large = bytes >= kLargeBlock && device_type == aoti_torch_device_type_cpu();
  if (large && take_block(bytes, sizes, strides, dtype, device_index, &handle)) return Tensor(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, device_index, &handle));
  const Tensor made(handle);
  if (large) prefer_large_pages(made.mutable_data_ptr(), bytes);
  return made;
}
inline Tensor empty_strided(const Tensor& t, const Sizes& sizes, const Sizes& strides) {
  return empty_strided(t, sizes, strides, dtype_of(t));
}

}  // namespace ldmfast

// LDMFAST_CPU_KERNEL(op) at the bottom of csrc/cpu/<op>.cpp, outside any namespace. The file is compiled once per
// level with LDMFAST_LEVEL set to its name, and must define LDMFAST_LEVEL_NAMESPACE::op. The object of the lowest
// level also registers: it alone runs code at load time, before anyone knows what the CPU can do. The linker gets
// the levels in ascending order, so of an inline function that several emit it keeps the one every CPU can run.
#ifdef LDMFAST_LEVEL
#define LDMFAST_LEVEL_NAMESPACE ldmfast::LDMFAST_LEVEL
#define LDMFAST_BOXED_(op)                                                              \
  namespace LDMFAST_LEVEL_NAMESPACE {                                                   \
  void boxed_##op(StableIValue* stack, uint64_t inputs, uint64_t outputs) {             \
    LDMFAST_BOX(&op)(stack, inputs, outputs);                                           \
  }                                                                                     \
  }
#define LDMFAST_DECLARE_(op, level)                     \
  namespace ldmfast::level {                            \
  void boxed_##op(StableIValue*, uint64_t, uint64_t);   \
  }
#define LDMFAST_SELECT_(op, level) \
  if (::ldmfast::isa::chosen() == ::ldmfast::isa::Level::level) m.impl(#op, &::ldmfast::level::boxed_##op);
#ifdef LDMFAST_REGISTERS
#define LDMFAST_CPU_KERNEL(op)                  \
  LDMFAST_BOXED_(op)                            \
  LDMFAST_EACH_LEVEL(LDMFAST_DECLARE_, op)      \
  STABLE_TORCH_LIBRARY_IMPL(ldmfast, CPU, m) {  \
    LDMFAST_EACH_LEVEL(LDMFAST_SELECT_, op)     \
  }
#else
#define LDMFAST_CPU_KERNEL(op) LDMFAST_BOXED_(op)
#endif
#endif

// LDMFAST_CUDA_KERNEL(op) at the bottom of csrc/cuda/<op>.cu.
#define LDMFAST_CUDA_KERNEL(op) \
  STABLE_TORCH_LIBRARY_IMPL(ldmfast, CUDA, m) { m.impl(#op, LDMFAST_BOX(&::ldmfast::cuda::op)); }
// The same for a kernel that takes part of the calls only: registered as <op>_cuda, which ldmfast/ops/<op>.py calls.
#define LDMFAST_CUDA_PART_KERNEL(op) \
  STABLE_TORCH_LIBRARY_IMPL(ldmfast, CUDA, m) { m.impl(#op "_cuda", LDMFAST_BOX(&::ldmfast::cuda::op)); }

#ifdef USE_CUDA
namespace ldmfast::cuda {
// The stream torch works on for this tensor's device. Hold a DeviceGuard while launching on it.
inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
using DeviceGuard = torch::stable::accelerator::DeviceGuard;
}  // namespace ldmfast::cuda
#endif
