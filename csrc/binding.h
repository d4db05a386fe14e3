// What the torch bindings share: checks, types, threads and the CUDA stream. Stable ABI headers only, so that one
// binary serves every torch from 2.10 on.
#pragma once

#ifdef VQKERNELS_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "cpu/float_mode.h"
#include "cpu/nearest_code.h"
#include "cpu/parallel.h"
#include "types.h"

#ifdef VQKERNELS_CUDA
#include "cuda/nearest_code.h"

// Absent where torch has no CUDA: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace vqkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Public functions have explained what is wrong with an argument; these checks are what memory safety needs of a
// direct torch.ops call.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool equal = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) equal = equal && t.size(i++) == size;
  STD_TORCH_CHECK(equal, "vqkernels: ", name, " has an unexpected shape");
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, "vqkernels: ", name, " has an unexpected dtype");
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(t.is_cpu() == other.is_cpu() && t.get_device_index() == other.get_device_index(), "vqkernels: ", name,
                  " is on another device");
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "vqkernels: ", name, " has an unexpected dtype");
  }
}

inline Metric metric_of(const std::string& metric) {
  if (metric == "l2") return Metric::l2;
  if (metric == "cosine") return Metric::cosine;
  STD_TORCH_CHECK(metric == "dot", "vqkernels: unknown metric ", metric);
  return Metric::dot;
}

inline Estimator estimator_of(const std::string& gradient) {
  if (gradient == "straight_through") return Estimator::straight_through;
  if (gradient == "rotation") return Estimator::rotation;
  STD_TORCH_CHECK(gradient == "none", "vqkernels: unknown gradient ", gradient);
  return Estimator::none;
}

inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

inline cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = torch::stable::get_num_threads();
  parallel.run = [](int64_t count, const cpu::Body& body) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const cpu::KeepSubnormals mode;
      body(begin, end);
    });
  };
  return parallel;
}

#ifdef VQKERNELS_CUDA
// While it lives the device of a tensor is the current one; stream is torch's current stream on it.
class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "vqkernels: this torch has no CUDA");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline Tensor work_memory(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }

// bfloat16 and float16 as float32, exactly; others as they are.
inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == accumulation_type(t) ? t : torch::stable::to(t, accumulation_type(t));
}
#endif

// z [H, N, D] and codebook [H, K, D], contiguous and of types that go together, with the optional mask [H, N].
struct SearchInputs {
  Tensor z;
  Tensor codebook;
  std::optional<Tensor> mask;
  Metric metric;
  int64_t heads;
  int64_t rows;
  int64_t codes;
  int64_t dim;

  cpu::NearestCodeProblem cpu_problem() const {
    return {z.const_data_ptr(),
            codebook.const_data_ptr(),
            mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
            dtype_of(z, "z"),
            dtype_of(codebook, "codebook"),
            metric,
            heads,
            rows,
            codes,
            dim};
  }
};

inline SearchInputs search_inputs(const Tensor& z, const Tensor& codebook, const std::string& metric,
                                  const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(z.dim() == 3 && codebook.dim() == 3, "vqkernels: expected z [H, N, D] and codebook [H, K, D]");
  const int64_t heads = z.size(0), rows = z.size(1), dim = z.size(2), codes = codebook.size(1);
  STD_TORCH_CHECK(codes > 0 && dim > 0, "vqkernels: expected a codebook that is not empty");
  check_shape(codebook, "codebook", {heads, codes, dim});
  check_same_device(codebook, "codebook", z);
  dtype_of(z, "z");
  dtype_of(codebook, "codebook");
  std::optional<Tensor> dense_mask;
  if (mask) {
    check_shape(*mask, "mask", {heads, rows});
    check_type(*mask, "mask", ScalarType::Bool);
    check_same_device(*mask, "mask", z);
    dense_mask = torch::stable::contiguous(*mask);
  }
  Tensor dense_z = torch::stable::contiguous(z), dense_codebook = torch::stable::contiguous(codebook);
  if (accumulation_type(z) != accumulation_type(codebook)) {
    dense_z = torch::stable::to(dense_z, ScalarType::Double);
    dense_codebook = torch::stable::to(dense_codebook, ScalarType::Double);
  }
  return {dense_z, dense_codebook, dense_mask, metric_of(metric), heads, rows, codes, dim};
}

#ifdef VQKERNELS_CUDA
// z and codebook: those of the inputs, widened.
inline cuda::NearestCodeProblem cuda_search_problem(const SearchInputs& in, const Tensor& z, const Tensor& codebook) {
  return {z.const_data_ptr(),
          codebook.const_data_ptr(),
          in.mask ? static_cast<const bool*>(in.mask->const_data_ptr()) : nullptr,
          dtype_of(z, "z"),
          in.metric,
          in.heads,
          in.rows,
          in.codes,
          in.dim};
}

inline void search_on_cuda(const SearchInputs& in, const Tensor& z, const Tensor& codebook, const CudaDevice& device,
                           Tensor& scores, Tensor& indices) {
  const cuda::NearestCodeProblem problem = cuda_search_problem(in, z, codebook);
  Tensor workspace = work_memory(z, cuda::nearest_code_workspace(problem));
  cuda::nearest_code(problem, workspace.mutable_data_ptr(), scores.mutable_data_ptr(),
                     indices.mutable_data_ptr<int64_t>(), device.stream);
}
#endif

}  // namespace vqkernels
