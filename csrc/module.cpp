// The Python module _C: what this build contains and what the CPU offers. Operators register themselves with torch
// when the shared object is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/capability.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", VQKERNELS_COMPILER},
          {"torch", VQKERNELS_TORCH_VERSION},
          {"cuda", VQKERNELS_CUDA_VERSION},
          {"cuda_architectures", VQKERNELS_CUDA_ARCHITECTURES}};
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto level : vqkernels::cpu::supported_capabilities()) names.emplace_back(vqkernels::cpu::name(level));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vqkernels.";
  m.def("build_info", &build_info, "Compiler, torch, CUDA version and architectures of this build; empty: none.");
  m.def("cpu_capabilities", &cpu_capabilities, "Instruction sets this machine can run the kernels with, ascending.");
  m.def(
      "cpu_capability", [] { return std::string(vqkernels::cpu::name(vqkernels::cpu::capability())); },
      "The instruction set in use: the highest, or the one VQKERNELS_CPU_CAPABILITY names.");
}
