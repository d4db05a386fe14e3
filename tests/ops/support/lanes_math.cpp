// The functions of csrc/cpu/lanes_math.h on arrays of a multiple of 16 floats, for test_lanes_math.py.
#include "../../../csrc/cpu/lanes_math.h"

using namespace vqkernels::cpu;

template <class Function>
static void apply(const float* x, float* y, int64_t count, const Function& f) {
  for (int64_t i = 0; i < count; i += Lanes<float>::count) store(y + i, f(load(x + i)));
}

#define VQKERNELS_EXPORT(name, value)                                                                      \
  extern "C" __attribute__((visibility("default"))) void run_##name(const float* x, float* y, int64_t n) { \
    apply(x, y, n, [](const Lanes<float>& lanes) { return value; });                                       \
  }
VQKERNELS_EXPORT(exp, exp(lanes))
VQKERNELS_EXPORT(sigmoid, sigmoid(lanes))
VQKERNELS_EXPORT(complement, sigmoid_parts(lanes).complement)
VQKERNELS_EXPORT(cumulative, normal(lanes).cumulative)
VQKERNELS_EXPORT(density, normal(lanes).density)
