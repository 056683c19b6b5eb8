// ldmfast._C: what this build is and what this CPU can do. Holds no kernels and no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

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

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of ldmfast and the instruction-set levels of this CPU.";
  m.def("cpu_levels", [] { return names(isa::available()); }, "Levels of this build that this CPU runs, lowest first.");
  m.def("level_in_use", [] {
    for (const isa::Named& n : isa::built())
      if (n.level == isa::chosen()) return std::string(n.name);
    return std::string();
  }, "The level whose kernels are registered (LDMFAST_CPU_ISA forces one).");
  m.def("build_facts", &build_facts, "Compiler, oldest torch served, levels and CUDA architectures in this build.");
}
