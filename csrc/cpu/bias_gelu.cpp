#include "bias_gelu.h"

#include "buffer.h"
#include "capability.h"

namespace vqkernels::cpu {
namespace {

// Fewer numbers are not worth another thread.
constexpr int64_t kGrain = 8192;

const BiasGeluKernels& choose_kernels() {
  switch (capability()) {
#ifdef VQKERNELS_X86
    case Capability::avx512:
      return bias_gelu_avx512;
    case Capability::avx2:
      return bias_gelu_avx2;
#endif
    default:
      return bias_gelu_scalar;
  }
}

}  // namespace

void bias_gelu(const BiasGeluProblem& p, const RowsOut& y, const Parallel& parallel) {
  const BiasGeluKernels& kernels = choose_kernels();
  const int64_t rows = p.batch * p.length, block = std::max<int64_t>(1, kGrain / p.dim);
  parallel.run((rows + block - 1) / block,
               [&](int64_t begin, int64_t end) { kernels.forward(p, y, begin * block, std::min(end * block, rows)); });
}

void bias_gelu_backward(const BiasGeluProblem& p, const BiasGeluGradient& out, const Parallel& parallel) {
  const BiasGeluKernels& kernels = choose_kernels();
  const Chunks chunks(1, p.batch * p.length);
  const int64_t columns = p.dim;
  const Buffer<char> partial(chunks.count * columns * (p.wide ? 8 : 4));
  parallel.run(chunks.count,
               [&](int64_t begin, int64_t end) { kernels.backward(p, out, chunks, partial.get(), begin, end); });
  constexpr int64_t block = 256;
  parallel.run((columns + block - 1) / block, [&](int64_t begin, int64_t end) {
    kernels.reduce(p, out, chunks, partial.get(), begin * block, std::min(end * block, columns));
  });
}

}  // namespace vqkernels::cpu
