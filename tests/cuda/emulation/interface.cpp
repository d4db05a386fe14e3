// The operations as a test calls them: C functions on pointers to CPU memory. They return null or what went wrong.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../../csrc/cuda/code_statistics.h"
#include "../../../csrc/cuda/ema_update.h"
#include "../../../csrc/cuda/nearest_code.h"
#include "../../../csrc/cuda/residual_quantize.h"
#include "../../../csrc/cuda/topk_codes.h"
#include "../../../csrc/cuda/vector_quantize.h"
#include "cuda_runtime.h"
#include "faults.h"

namespace cuda = vqkernels::cuda;
using vqkernels::DType;
using vqkernels::Estimator;
using vqkernels::Metric;

namespace {

std::string message;

template <class Run>
const char* guarded(const Run& run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Work memory full of NaN, with a guard behind it.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), memory_(std::aligned_alloc(kAlignment, size()), std::free) {
    std::memset(memory_.get(), 0xff, size());
  }
  void* get() const { return memory_.get(); }
  void check() const {
    for (size_t i = static_cast<size_t>(bytes_); i < size(); ++i) {
      if (static_cast<unsigned char*>(memory_.get())[i] != 0xff) throw std::runtime_error("workspace overrun");
    }
  }

 private:
  static constexpr size_t kAlignment = 256;
  size_t size() const { return (static_cast<size_t>(bytes_) / kAlignment + 16) * kAlignment; }
  int64_t bytes_;
  std::unique_ptr<void, void (*)(void*)> memory_;
};

}  // namespace

extern "C" {

void configure(int multiprocessors, int shared_bytes, int descending) {
  emulation::configure(multiprocessors, shared_bytes, descending != 0);
}

int64_t count_launches() { return emulation::count_launches(); }

const char* fault(const char* name, float* out) {
  return guarded([&] { run_fault(name, out); });
}

const char* nearest_code(const void* z, const void* codebook, const bool* mask, int64_t type, int64_t metric,
                         int64_t heads, int64_t rows, int64_t codes, int64_t dim, void* scores, int64_t* indices) {
  return guarded([&] {
    const cuda::NearestCodeProblem problem{
        z, codebook, mask, static_cast<DType>(type), static_cast<Metric>(metric), heads, rows, codes, dim};
    const Memory workspace(cuda::nearest_code_workspace(problem));
    cuda::nearest_code(problem, workspace.get(), scores, indices, nullptr);
    workspace.check();
  });
}

const char* code_statistics(const void* z, const int64_t* indices, int64_t z_type, int64_t heads, int64_t rows,
                            int64_t codes, int64_t dim, int64_t* counts, void* sums) {
  return guarded([&] {
    const cuda::CodeStatisticsProblem problem{z, indices, static_cast<DType>(z_type), heads, rows, codes, dim, codes};
    const Memory workspace(cuda::code_statistics_workspace(problem));
    cuda::code_statistics(problem, workspace.get(), counts, sums, nullptr);
    workspace.check();
  });
}

const char* ema_update(float* codebook, float* cluster_size, float* code_sum, const int64_t* counts, const float* sums,
                       int64_t heads, int64_t codes, int64_t dim, double decay, double eps) {
  return guarded([&] {
    const Memory totals(heads * static_cast<int64_t>(sizeof(float)));
    const cuda::EmaUpdateProblem problem{codebook, cluster_size, code_sum, counts, sums, heads, codes, dim, decay, eps};
    cuda::ema_update(problem, static_cast<float*>(totals.get()), nullptr);
    totals.check();
  });
}

const char* vector_quantize(const void* z, const void* codebook, const int64_t* indices, const bool* mask,
                            int64_t z_type, int64_t heads, int64_t rows, int64_t codes, int64_t dim, void* quantized,
                            void* mse, int64_t* valid_rows) {
  return guarded([&] {
    const cuda::QuantizeProblem problem{z,     codebook, indices, mask, static_cast<DType>(z_type),
                                        heads, rows,     codes,   dim};
    const Memory errors(heads * rows * static_cast<int64_t>(sizeof(double)));
    cuda::vector_quantize(problem, quantized, errors.get(), mse, valid_rows, nullptr);
    errors.check();
  });
}

const char* vector_quantize_backward(const void* grad_quantized, const void* grad_mse, const void* z,
                                     const void* codebook, const int64_t* indices, const int64_t* valid_rows,
                                     int64_t z_type, int64_t heads, int64_t rows, int64_t codes, int64_t dim,
                                     int64_t estimator, void* grad_z) {
  return guarded([&] {
    const cuda::QuantizeProblem problem{z,     codebook, indices, nullptr, static_cast<DType>(z_type),
                                        heads, rows,     codes,   dim};
    cuda::vector_quantize_backward(problem, grad_quantized, grad_mse, valid_rows, static_cast<Estimator>(estimator),
                                   grad_z, nullptr);
  });
}

const char* residual_quantize(const void* z, const void* codebooks, const bool* mask, const int64_t* num_levels,
                              const int64_t* known, int64_t z_type, int64_t metric, int64_t heads, int64_t rows,
                              int64_t dim, const int64_t* sizes, int64_t levels, void* quantized, int64_t* indices,
                              void* mse, int64_t* valid_rows) {
  return guarded([&] {
    const cuda::ResidualProblem problem{z,
                                        codebooks,
                                        mask,
                                        num_levels,
                                        known,
                                        static_cast<DType>(z_type),
                                        static_cast<Metric>(metric),
                                        heads,
                                        rows,
                                        dim,
                                        cuda::make_levels(sizes, levels)};
    const Memory workspace(cuda::residual_quantize_workspace(problem));
    cuda::residual_quantize(problem, workspace.get(), quantized, indices, mse, valid_rows, nullptr);
    workspace.check();
  });
}

const char* residual_quantize_backward(const void* grad_quantized, const void* grad_mse, const void* z,
                                       const void* codebooks, const int64_t* indices, const int64_t* valid_rows,
                                       int64_t z_type, int64_t estimator, int64_t heads, int64_t rows, int64_t dim,
                                       const int64_t* sizes, int64_t levels, void* grad_z) {
  return guarded([&] {
    const cuda::ResidualGradientProblem problem{grad_quantized,
                                                grad_mse,
                                                z,
                                                codebooks,
                                                indices,
                                                valid_rows,
                                                static_cast<DType>(z_type),
                                                static_cast<Estimator>(estimator),
                                                heads,
                                                rows,
                                                dim,
                                                cuda::make_levels(sizes, levels)};
    const Memory workspace(cuda::residual_quantize_backward_workspace(problem));
    cuda::residual_quantize_backward(problem, workspace.get(), grad_z, nullptr);
    workspace.check();
  });
}

const char* residual_statistics(const void* z, const void* codebooks, const int64_t* indices, int64_t z_type,
                                int64_t heads, int64_t rows, int64_t dim, const int64_t* sizes, int64_t levels,
                                int64_t* counts, void* sums) {
  return guarded([&] {
    const cuda::ResidualStatisticsProblem problem{z,     codebooks, indices, static_cast<DType>(z_type),
                                                  heads, rows,      dim,     cuda::make_levels(sizes, levels)};
    const Memory workspace(cuda::residual_statistics_workspace(problem));
    cuda::residual_statistics(problem, workspace.get(), counts, sums, nullptr);
    workspace.check();
  });
}

const char* topk_codes(const void* z, const void* codebook, const bool* mask, int64_t type, int64_t metric,
                       int64_t heads, int64_t rows, int64_t codes, int64_t dim, int64_t k, void* scores,
                       int64_t* indices) {
  return guarded([&] {
    const cuda::NearestCodeProblem problem{
        z, codebook, mask, static_cast<DType>(type), static_cast<Metric>(metric), heads, rows, codes, dim};
    const Memory workspace(cuda::topk_codes_workspace(problem));
    cuda::topk_codes(problem, k, workspace.get(), scores, indices, nullptr);
    workspace.check();
  });
}

}  // extern "C"
