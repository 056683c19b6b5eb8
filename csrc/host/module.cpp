// ldmfast._C: what this build is and what this CPU can do. Holds no kernels and no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "common/isa.h"

namespace isa = ldmfast::isa;
namespace py = pybind11;

static std::vector<std::string> names(const std::vector<isa::Named>& levels) {
  std::vector<std::string> out;
  for (const isa::Named& n : levels) out.emplace_back(n.name);
  return out;
}

static std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    out.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return out;
}

static py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["torch_target"] = "2.10";
  facts["cpu_levels"] = names(isa::built());
  facts["cuda_archs"] = words(LDMFAST_CUDA_ARCHS);
  facts["sanitized"] = bool(LDMFAST_SANITIZED);
  return facts;
}

// glibc takes every block above 32 MiB fresh from the kernel and gives it back at once: its pages are then faulted in and
// cleared anew at each use, which costs more than what an op does with them. Blocks up to 64 MiB, which a UNet's are, come
// from the heap instead, which keeps up to 512 MiB that is free; larger ones would leave holes as large in it. Nothing is
// changed where the user has set malloc up himself.
static bool keep_freed_memory() {
#if defined(__GLIBC__)
  for (const char* name : {"MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"})
    if (std::getenv(name) != nullptr) return false;
  malloc_trim(0);
  static const bool done = mallopt(M_MMAP_THRESHOLD, 64 << 20) != 0 && mallopt(M_TRIM_THRESHOLD, 512 << 20) != 0;
  return done;
#else
  return false;
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of ldmfast and the instruction-set levels of this CPU.";
  m.def("cpu_levels", [] { return names(isa::available()); }, "Levels of this build that this CPU runs, lowest first.");
  m.def("level_in_use", [] {
    for (const isa::Named& n : isa::built())
      if (n.level == isa::chosen()) return std::string(n.name);
    return std::string();
  }, "The level whose kernels are registered (LDMFAST_CPU_ISA forces one).");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Gives free memory back now, and lets large blocks that are freed later be used again; False where that is not ours.");
  m.def("build_facts", &build_facts, "Compiler, oldest torch served, levels and CUDA architectures in this build.");
}
