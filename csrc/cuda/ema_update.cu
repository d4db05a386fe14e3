#include "ema_update.h"

#include "fixed_order.h"
#include "launch.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;

// Block h updates the cluster sizes of head h and writes their sum.
__global__ void __launch_bounds__(kRowLanes) update_sizes(EmaUpdateProblem p, float weight, float* totals) {
  const int64_t head = blockIdx.x;
  float* __restrict__ size = p.cluster_size + head * p.codes;
  const int64_t* __restrict__ counts = p.counts + head * p.codes;
  double* lanes = reinterpret_cast<double*>(vqkernels_shared);
  const double total = column_sum(p.codes, lanes, [&](int64_t k) {
    const float old = size[k];
    const float updated = fused(weight, static_cast<float>(counts[k]) - old, old);
    size[k] = updated;
    return updated;
  });
  if (threadIdx.x == 0) totals[head] = static_cast<float>(total);
}

// A group of threads a code. added: codes * eps.
__global__ void __launch_bounds__(kThreads)
    update_codes(EmaUpdateProblem p, RowGroup group, float weight, float eps, float added, const float* totals) {
  const int64_t k = group.row();
  if (k >= p.heads * p.codes) return;
  const float n = totals[p.heads == 1 ? 0 : k / p.codes];
  const float smoothed = (p.cluster_size[k] + eps) / (n + added) * n;
  for (int64_t d = k * p.dim + group.lane(); d < (k + 1) * p.dim; d += group.size()) {
    const float old = p.code_sum[d];
    const float updated = fused(weight, p.sums[d] - old, old);
    p.code_sum[d] = updated;
    if (smoothed > 0) p.codebook[d] = updated / smoothed;
  }
}

}  // namespace

void ema_update(const EmaUpdateProblem& p, float* totals, cudaStream_t stream) {
  const float weight = static_cast<float>(1.0 - p.decay);
  const float added = static_cast<float>(static_cast<double>(p.codes) * p.eps);
  launch(update_sizes, p.heads, kRowLanes, kRowLanes * sizeof(double), stream, p, weight, totals);
  const RowGroup group = RowGroup::of(p.dim, 5);
  launch(update_codes, group.blocks(p.heads * p.codes, kThreads), kThreads, 0, stream, p, group, weight,
         static_cast<float>(p.eps), added, totals);
}

}  // namespace vqkernels::cuda
