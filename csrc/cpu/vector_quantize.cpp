#include "vector_quantize.h"

#include <vector>

#include "capability.h"
#include "fixed_order.h"

namespace vqkernels::cpu {
namespace {

struct Kernels {
  QuantizeRowsKernel forward;
  QuantizeRowsBackwardKernel backward;
};

Kernels choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return {quantize_rows_avx512, quantize_rows_backward_avx512};
    case Capability::avx2:
      return {quantize_rows_avx2, quantize_rows_backward_avx2};
#endif
    default:
      return {quantize_rows_scalar, quantize_rows_backward_scalar};
  }
}

int64_t bytes(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

const void* advance(const void* p, int64_t elements, DType type) {
  return static_cast<const char*>(p) + elements * bytes(type);
}

void* advance(void* p, int64_t elements, DType type) { return static_cast<char*>(p) + elements * bytes(type); }

QuantizeRows rows_of(const NearestCodeProblem& p, const int64_t* indices, int64_t head, int64_t begin, int64_t end) {
  const int64_t first = head * p.rows + begin;
  return {advance(p.z, first * p.dim, p.z_type),
          advance(p.codebook, head * p.codes * p.dim, p.codebook_type),
          indices + first,
          p.mask == nullptr ? nullptr : p.mask + first,
          p.z_type,
          p.codebook_type,
          end - begin,
          p.dim};
}

template <class T>
QuantizeResult quantize(const NearestCodeProblem& p, void* quantized, int64_t* indices, const Parallel& parallel) {
  const QuantizeRowsKernel kernel = choose_kernels().forward;
  const int64_t total_rows = p.heads * p.rows;
  // A row's score is not needed once its index is known: its place takes the row's error.
  std::vector<T> errors(static_cast<size_t>(total_rows));
  nearest_code(p, errors.data(), indices, parallel, [&](int64_t head, int64_t begin, int64_t end) {
    const int64_t first = head * p.rows + begin;
    kernel(rows_of(p, indices, head, begin, end), advance(quantized, first * p.dim, p.z_type), &errors[first]);
  });
  QuantizeResult result{0, 0};
  for (int64_t i = 0; i < total_rows; ++i) result.valid_rows += indices[i] >= 0;
  if (result.valid_rows > 0) {
    result.mse = column_sum(errors.data(), total_rows) / static_cast<double>(result.valid_rows * p.dim);
  }
  return result;
}

}  // namespace

QuantizeResult vector_quantize(const NearestCodeProblem& p, void* quantized, int64_t* indices,
                               const Parallel& parallel) {
  return p.z_type == DType::float64 ? quantize<double>(p, quantized, indices, parallel)
                                    : quantize<float>(p, quantized, indices, parallel);
}

void vector_quantize_backward(const NearestCodeProblem& p, const int64_t* indices, const void* grad_quantized,
                              Estimator estimator, double coefficient, void* grad_z, const Parallel& parallel) {
  const QuantizeRowsBackwardKernel kernel = choose_kernels().backward;
  for (int64_t head = 0; head < p.heads; ++head) {
    parallel.run(p.rows, [&](int64_t begin, int64_t end) {
      const int64_t first = (head * p.rows + begin) * p.dim;
      const void* grad = grad_quantized == nullptr ? nullptr : advance(grad_quantized, first, p.z_type);
      kernel(rows_of(p, indices, head, begin, end), grad, estimator, coefficient, advance(grad_z, first, p.z_type));
    });
  }
}

}  // namespace vqkernels::cpu
