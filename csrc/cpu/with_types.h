// From the types of a problem's inputs, known when it runs, to types of C++.
#pragma once

#include "../float16.h"
#include "../types.h"

namespace vqkernels::cpu {
namespace {

// Calls run(accumulation type, type of z, type of the codebook) with values of those types.
template <class Run>
inline void with_types(DType z_type, DType codebook_type, const Run& run) {
  const auto with_codebook = [&](auto z) {
    switch (codebook_type) {
      case DType::bfloat16:
        return run(float{}, z, BFloat16{});
      case DType::float16:
        return run(float{}, z, Half{});
      default:
        return run(float{}, z, float{});
    }
  };
  switch (z_type) {
    case DType::float64:
      return run(double{}, double{}, double{});
    case DType::bfloat16:
      return with_codebook(BFloat16{});
    case DType::float16:
      return with_codebook(Half{});
    default:
      return with_codebook(float{});
  }
}

}  // namespace
}  // namespace vqkernels::cpu
