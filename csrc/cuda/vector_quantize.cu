// Half a warp works on a row: its threads are the lanes of row_dot.
#include "vector_quantize.h"

#include "../float16.h"
#include "fixed_order.h"
#include "launch.h"
#include "rotation.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLog2Lanes = 4;
static_assert(1 << kLog2Lanes == kColumnLanes);

__device__ inline void quiet_nan(float* x) { *x = __uint_as_float(0x7fc00000u); }
__device__ inline void quiet_nan(double* x) { *x = __longlong_as_double(0x7ff8000000000000ll); }

// The row of a group of threads. No thread leaves early, for the sums need whole warps: rows from `rows` on repeat the
// last one and write nothing.
struct Row {
  int64_t index;
  int64_t lane;
  bool exists;
  bool has_code;
  int64_t code;  // among the codes of all heads; of a row without a code that of
                 // the head's first

  __device__ explicit Row(const QuantizeProblem& p) {
    const RowGroup group{kLog2Lanes};
    const int64_t rows = p.heads * p.rows;
    exists = group.row() < rows;
    index = exists ? group.row() : rows - 1;
    lane = group.lane();
    const int64_t chosen = p.indices[index];
    has_code = chosen >= 0 && chosen < p.codes;
    code = (p.heads == 1 ? 0 : index / p.rows * p.codes) + (has_code ? chosen : 0);
  }
};

template <class T, class Z>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(QuantizeProblem p, Z* quantized, T* errors, unsigned long long* valid_rows) {
  const Row row(p);
  const Z* e = static_cast<const Z*>(p.z) + row.index * p.dim;
  const T* c = static_cast<const T*>(p.codebook) + row.code * p.dim;
  const auto difference = [&](int64_t d) { return static_cast<T>(widen(e[d])) - c[d]; };
  const T error = row_dot<T>(p.dim, row.lane, difference, difference);
  const bool masked = p.mask != nullptr && !p.mask[row.index];
  T fill = 0;
  if (!masked) quiet_nan(&fill);
  if (row.exists) {
    Z* out = quantized + row.index * p.dim;
    for (int64_t d = row.lane; d < p.dim; d += kColumnLanes) narrow(row.has_code ? c[d] : fill, out + d);
    if (row.lane == 0) errors[row.index] = row.has_code ? error : T(0);
  }
  const unsigned counted = __ballot_sync(kFullWarp, row.exists && row.has_code && row.lane == 0);
  if (threadIdx.x % kWarpSize == 0 && counted != 0) {
    atomicAdd(valid_rows, static_cast<unsigned long long>(__popc(counted)));
  }
}

template <class T>
__global__ void __launch_bounds__(kRowLanes)
    mean_error(const T* errors, int64_t rows, int64_t dim, const int64_t* valid_rows, T* mse) {
  double* lanes = reinterpret_cast<double*>(vqkernels_shared);
  const double sum = column_sum(rows, lanes, [&](int64_t i) { return errors[i]; });
  if (threadIdx.x == 0) *mse = static_cast<T>(*valid_rows > 0 ? sum / static_cast<double>(*valid_rows * dim) : 0.0);
}

template <class T, class Z>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_backward(QuantizeProblem p, const Z* grad_quantized, const T* grad_mse, const int64_t* valid_rows,
                           Estimator estimator, Z* grad_z) {
  const Row row(p);
  const T* codebook = static_cast<const T*>(p.codebook) + row.code * p.dim;
  const int64_t first = row.index * p.dim;
  const auto e = [&](int64_t d) { return static_cast<T>(widen(static_cast<const Z*>(p.z)[first + d])); };
  const auto c = [&](int64_t d) { return codebook[d]; };
  const auto g = [&](int64_t d) { return static_cast<T>(widen(grad_quantized[first + d])); };
  const auto write = [&](int64_t d, T gradient) {
    if (row.exists) narrow(row.has_code ? gradient : T(0), grad_z + first + d);
  };
  T coefficient = 0;
  if (grad_mse != nullptr && *valid_rows > 0) {
    coefficient = static_cast<T>(static_cast<double>(*grad_mse) * 2 / static_cast<double>(*valid_rows * p.dim));
  }
  if (grad_quantized != nullptr && estimator == Estimator::rotation) {
    return rotate_gradient(e, c, g, p.dim, row.lane, coefficient, write);
  }
  const bool passes = grad_quantized != nullptr && estimator == Estimator::straight_through;
  for (int64_t d = row.lane; d < p.dim; d += kColumnLanes) {
    const T pull = coefficient * (e(d) - c(d));
    write(d, passes ? g(d) + pull : pull);
  }
}

template <class T, class Z>
void quantize(const QuantizeProblem& p, void* quantized, void* errors, void* mse, int64_t* valid_rows,
              cudaStream_t stream) {
  const int64_t rows = p.heads * p.rows;
  check(cudaMemsetAsync(valid_rows, 0, sizeof(int64_t), stream));
  launch(quantize_rows<T, Z>, RowGroup{kLog2Lanes}.blocks(rows, kThreads), kThreads, 0, stream, p,
         static_cast<Z*>(quantized), static_cast<T*>(errors), reinterpret_cast<unsigned long long*>(valid_rows));
  launch(mean_error<T>, 1, kRowLanes, kRowLanes * sizeof(double), stream, static_cast<const T*>(errors), rows, p.dim,
         valid_rows, static_cast<T*>(mse));
}

template <class T, class Z>
void backward(const QuantizeProblem& p, const void* grad_quantized, const void* grad_mse, const int64_t* valid_rows,
              Estimator estimator, void* grad_z, cudaStream_t stream) {
  launch(quantize_rows_backward<T, Z>, RowGroup{kLog2Lanes}.blocks(p.heads * p.rows, kThreads), kThreads, 0, stream, p,
         static_cast<const Z*>(grad_quantized), static_cast<const T*>(grad_mse), valid_rows, estimator,
         static_cast<Z*>(grad_z));
}

}  // namespace

void vector_quantize(const QuantizeProblem& p, void* quantized, void* errors, void* mse, int64_t* valid_rows,
                     cudaStream_t stream) {
  switch (p.z_type) {
    case DType::float64:
      return quantize<double, double>(p, quantized, errors, mse, valid_rows, stream);
    case DType::bfloat16:
      return quantize<float, BFloat16>(p, quantized, errors, mse, valid_rows, stream);
    case DType::float16:
      return quantize<float, Half>(p, quantized, errors, mse, valid_rows, stream);
    default:
      return quantize<float, float>(p, quantized, errors, mse, valid_rows, stream);
  }
}

void vector_quantize_backward(const QuantizeProblem& p, const void* grad_quantized, const void* grad_mse,
                              const int64_t* valid_rows, Estimator estimator, void* grad_z, cudaStream_t stream) {
  switch (p.z_type) {
    case DType::float64:
      return backward<double, double>(p, grad_quantized, grad_mse, valid_rows, estimator, grad_z, stream);
    case DType::bfloat16:
      return backward<float, BFloat16>(p, grad_quantized, grad_mse, valid_rows, estimator, grad_z, stream);
    case DType::float16:
      return backward<float, Half>(p, grad_quantized, grad_mse, valid_rows, estimator, grad_z, stream);
    default:
      return backward<float, float>(p, grad_quantized, grad_mse, valid_rows, estimator, grad_z, stream);
  }
}

}  // namespace vqkernels::cuda
