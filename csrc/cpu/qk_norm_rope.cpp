#include "qk_norm_rope.h"

#include "capability.h"

namespace vqkernels::cpu {
namespace {

struct Kernels {
  QkNormRopeKernel forward;
  QkNormRopeBackwardKernel backward;
};

Kernels choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return {qk_norm_rope_avx512, qk_norm_rope_backward_avx512};
    case Capability::avx2:
      return {qk_norm_rope_avx2, qk_norm_rope_backward_avx2};
#endif
    default:
      return {qk_norm_rope_scalar, qk_norm_rope_backward_scalar};
  }
}

template <class A>
void sum_chunks(const double* sums, int64_t chunks, int64_t size, A* out, const Parallel& parallel) {
  parallel.run(size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * size + i];
      out[i] = static_cast<A>(total);
    }
  });
}

}  // namespace

void qk_norm_rope(const QkNormRopeProblem& p, void* out, const HeadStrides& out_strides, const Parallel& parallel) {
  const Kernels kernels = choose_kernels();
  parallel.run(p.rows(), [&](int64_t begin, int64_t end) { kernels.forward(p, out, out_strides, begin, end); });
}

void qk_norm_rope_backward(const QkNormRopeProblem& p, const QkNormRopeGradients& g, void* grad_weight, void* grad_bias,
                           const Parallel& parallel) {
  const Kernels kernels = choose_kernels();
  const int64_t chunks = p.chunks();
  parallel.run(chunks, [&](int64_t begin, int64_t end) { kernels.backward(p, g, begin, end); });
  const auto finish = [&](const HeadParameter& parameter, const double* sums, void* out) {
    const int64_t size = parameter.heads * p.dim;
    if (p.type == DType::float64) {
      sum_chunks(sums, chunks, size, static_cast<double*>(out), parallel);
    } else {
      sum_chunks(sums, chunks, size, static_cast<float*>(out), parallel);
    }
  };
  finish(p.weight, g.weight_sums, grad_weight);
  finish(p.bias, g.bias_sums, grad_bias);
}

}  // namespace vqkernels::cpu
