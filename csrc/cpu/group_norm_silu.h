// Group normalisation with an affine map of the channels and SiLU, and its gradient.
//
// x is [batch, channels, positions], or [batch, positions, channels] with channels_last. A group is channels / groups
// adjacent channels of one sample, n = channels / groups * positions elements:
//     h = (x - mean) * rstd * weight + bias,   y = h * sigmoid(h),   rstd = 1 / sqrt(var + eps)
//
// Moments are taken of chunks (kMomentElements adjacent elements, or kBlockRows positions of each channel): sums of
// x - c and (x - c)^2 in the accumulation type about a center c, the mean of the first few elements, and if that is far
// from the mean of all, again about the latter; chunks are put together in double. Gradients, with g = dy * silu'(h),
// S1 = sum g and S2 = sum g (x - mean) over the positions of a channel (blocks in the accumulation type, then double),
// and A, B the sums of slope S1 and slope S2 over a group, slope = rstd * weight:
//     dx = slope g - A / n - (x - mean) rstd^2 B / n
//     dweight = sum over samples of rstd S2,   dbias = sum over samples of S1
//
// What is added up in which order depends on the shape alone.
#pragma once

#include <cstdint>

#include "../types.h"
#include "parallel.h"

namespace vqkernels::cpu {

inline constexpr int64_t kMomentElements = 4096;
inline constexpr int64_t kBlockRows = 128;
// Sums of a sample that are kept apart at a time with channels_last.
inline constexpr int64_t kMaxPartialSums = 64;

struct GroupNormSiluProblem {
  const void* x;
  const void* weight;  // [channels] in the accumulation type, or null: 1
  const void* bias;    // [channels] in the accumulation type, or null: 0
  DType type;          // of x, y and their gradients
  bool channels_last;
  bool silu;
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t groups;
  double eps;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_size() const { return group_channels() * positions; }
  // What is worked on independently: a group of a sample, with channels_last a sample.
  int64_t units() const { return channels_last ? batch : batch * groups; }
  int64_t unit_groups() const { return channels_last ? groups : 1; }
  // Parts of a unit in forward.
  int64_t chunks() const {
    return channels_last ? (positions + kBlockRows - 1) / kBlockRows
                         : (group_size() + kMomentElements - 1) / kMomentElements;
  }
  // Parts of a unit in backward: a channel, or with channels_last so many positions.
  int64_t part_rows() const {
    const int64_t rows = (positions + kMaxPartialSums - 1) / kMaxPartialSums;
    return (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  }
  int64_t parts() const {
    if (!channels_last) return group_channels();
    return positions == 0 ? 0 : (positions + part_rows() - 1) / part_rows();
  }
};

struct Moments {
  double mean;
  double squares;  // sum of (x - mean)^2
};

struct ChannelSums {
  double gradient;  // S1
  double product;   // S2
};

struct GroupGradient {
  double shift;  // A / n
  double slope;  // rstd^2 B / n
};

// Every function works on the chunks or parts [begin, end) of a unit.
struct GroupNormSiluKernels {
  // moments: [chunks, unit_groups] of this unit.
  void (*moments)(const GroupNormSiluProblem&, int64_t unit, int64_t begin, int64_t end, Moments* moments);
  // mean, rstd: [unit_groups] of this unit.
  void (*normalize)(const GroupNormSiluProblem&, int64_t unit, int64_t begin, int64_t end, const double* mean,
                    const double* rstd, void* y);
  // sums: [channels of a group], with channels_last [parts, channels], of this unit; mean, rstd: [batch, groups]. Where
  // x is in the accumulation type, grad_x is left holding g for `gradient`.
  void (*sums)(const GroupNormSiluProblem&, int64_t unit, int64_t begin, int64_t end, const void* mean,
               const void* rstd, const void* grad, void* grad_x, ChannelSums* sums);
  // gradients: [unit_groups] of this unit.
  void (*gradient)(const GroupNormSiluProblem&, int64_t unit, int64_t begin, int64_t end, const void* mean,
                   const void* rstd, const void* grad, const GroupGradient* gradients, void* grad_x);
};

GroupNormSiluKernels group_norm_silu_scalar();
GroupNormSiluKernels group_norm_silu_avx2();
GroupNormSiluKernels group_norm_silu_avx512();

// y like x; mean and rstd [batch, groups] in the accumulation type.
void group_norm_silu(const GroupNormSiluProblem& problem, void* y, void* mean, void* rstd, const Parallel& parallel);

// grad and grad_x like x (grad_x null: not wanted); grad_weight and grad_bias [channels] in the accumulation type.
void group_norm_silu_backward(const GroupNormSiluProblem& problem, const void* grad, const void* mean, const void* rstd,
                              void* grad_x, void* grad_weight, void* grad_bias, const Parallel& parallel);

}  // namespace vqkernels::cpu
