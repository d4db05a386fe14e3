// Which instruction set the CPU kernels run with.
#pragma once

#include <string>
#include <vector>

namespace vqkernels::cpu {

enum class Capability { scalar, avx2, avx512 };

const char* name(Capability capability);

// Levels this CPU and operating system can run and this build contains, ascending.
std::vector<Capability> supported_capabilities();

// The level to run with: the highest supported, or the one VQKERNELS_CPU_CAPABILITY names. It is read
// at every call, so that one process can compare levels. Throws std::runtime_error where the variable
// names an unknown level or one this machine cannot run.
Capability capability();

}  // namespace vqkernels::cpu
