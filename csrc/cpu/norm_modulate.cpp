#include "norm_modulate.h"

#include "buffer.h"
#include "capability.h"

namespace vqkernels::cpu {
namespace {

// Less than this much of rows is not worth another thread.
constexpr int64_t kGrain = 16384;

const NormModulateKernels& choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return norm_modulate_avx512;
    case Capability::avx2:
      return norm_modulate_avx2;
#endif
    default:
      return norm_modulate_scalar;
  }
}

}  // namespace

void norm_modulate(const NormModulateProblem& p, const NormModulateResult& out, const Parallel& parallel) {
  const NormModulateKernels& kernels = choose_kernels();
  const int64_t rows = p.batch * p.length, block = std::max<int64_t>(1, kGrain / p.dim);
  parallel.run((rows + block - 1) / block, [&](int64_t begin, int64_t end) {
    kernels.forward(p, out, begin * block, std::min(end * block, rows));
  });
}

void norm_modulate_backward(const NormModulateProblem& p, const NormModulateGradient& out, const Parallel& parallel) {
  const NormModulateKernels& kernels = choose_kernels();
  const Chunks chunks(p.batch, p.length);
  const Buffer<char> partial(chunks.count * kSums * p.dim * (p.wide ? 8 : 4));
  parallel.run(chunks.count,
               [&](int64_t begin, int64_t end) { kernels.backward(p, out, chunks, partial.get(), begin, end); });
  constexpr int64_t block = 256;
  parallel.run((p.dim + block - 1) / block, [&](int64_t begin, int64_t end) {
    kernels.reduce(p, out, chunks, partial.get(), begin * block, std::min(end * block, p.dim));
  });
}

}  // namespace vqkernels::cpu
