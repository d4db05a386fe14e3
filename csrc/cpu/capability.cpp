#include "capability.h"

#include <cstdlib>
#include <stdexcept>

namespace vqkernels::cpu {

const char* name(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

static std::vector<Capability> detect() {
  std::vector<Capability> levels{Capability::scalar};
#ifdef VQKERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) levels.push_back(Capability::avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    levels.push_back(Capability::avx512);
  }
#endif
  return levels;
}

std::vector<Capability> supported_capabilities() {
  static const std::vector<Capability> levels = detect();
  return levels;
}

Capability capability() {
  static const std::vector<Capability> levels = detect();
  const char* wanted = std::getenv("VQKERNELS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return levels.back();
  std::string names;
  for (const Capability level : levels) {
    if (std::string(wanted) == name(level)) return level;
    names += std::string(names.empty() ? "" : ", ") + name(level);
  }
  throw std::runtime_error("VQKERNELS_CPU_CAPABILITY: expected one of the levels this machine runs (" + names +
                           "), got \"" + wanted + "\"");
}

}  // namespace vqkernels::cpu
