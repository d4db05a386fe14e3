// Plain types shared by the torch bindings, the CPU kernels and the CUDA kernels.
#pragma once

#include <cstdint>

namespace vqkernels {

enum class DType { float32, float64, bfloat16, float16 };

enum class Metric { l2, cosine, dot };

// How the gradient of the quantized rows reaches z.
enum class Estimator { straight_through, rotation, none };

// Members of a code are summed in runs of this many rows (docstring of code_statistics).
inline constexpr int64_t kRunLength = 256;

// Lanes of the fixed-order sums: over the columns of a row, and over rows or codes.
inline constexpr int64_t kColumnLanes = 16;
inline constexpr int64_t kRowLanes = 256;

}  // namespace vqkernels
