// A warp works on a few rows, its lanes go along the codes, and each lane lists the best of those it has met. Then the
// warp takes the best of all lists, again and again, until it has k codes or a list is used up that may have dropped
// some. In that case the codes are scored again, and those already taken are passed over.
#include "topk_codes.h"

#include <stdexcept>

#include "fixed_order.h"
#include "launch.h"
#include "prepare_codes.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpRows = 4;
constexpr int kRows = kWarps * kWarpRows;
constexpr int kListLength = 4;
constexpr int kColumns = 32;               // in shared memory at a time
constexpr int kRowPitch = kRows + 4;       // begins at a multiple of 16 bytes
constexpr int kCodePitch = kWarpSize + 1;  // keeps stores of columns free of bank conflicts
constexpr int64_t kMaxCodes = int64_t{1} << 30;

template <class T>
constexpr int64_t kSharedBytes = kColumns * (kRowPitch + kCodePitch) * static_cast<int64_t>(sizeof(T));

template <class T>
struct Arguments {
  const T* z;
  const T* codes;
  const T* bias;  // [heads, bias_pitch], NaN for invalid codes and behind the last
  const bool* row_valid;
  int64_t rows;
  int num_codes;
  int64_t dim;
  int64_t k;
  int64_t bias_pitch;
  int64_t row_blocks;
  T* scores;
  int64_t* indices;
};

// In descending order, among equal scores in ascending order of the codes; -Inf: no code.
template <class T>
struct List {
  T score[kListLength];
  int code[kListLength];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kListLength; ++j) {
      score[j] = -kInf<T>;
      code[j] = INT32_MAX;
    }
  }
  // Codes come in ascending order.
  __device__ void insert(T new_score, int new_code) {
#pragma unroll
    for (int j = kListLength - 1; j >= 0; --j) {
      if (!(new_score > score[j])) continue;
      const bool moves = j > 0 && new_score > score[j > 0 ? j - 1 : 0];
      score[j] = moves ? score[j > 0 ? j - 1 : 0] : new_score;
      code[j] = moves ? code[j > 0 ? j - 1 : 0] : new_code;
    }
  }
  __device__ void drop_first() {
#pragma unroll
    for (int j = 0; j + 1 < kListLength; ++j) {
      score[j] = score[j + 1];
      code[j] = code[j + 1];
    }
    score[kListLength - 1] = -kInf<T>;
    code[kListLength - 1] = INT32_MAX;
  }
};

// What a warp has written of a row, and the last code of it: later ones have a lower score, or the same and a higher
// index.
template <class T>
struct Progress {
  int64_t at;  // of the row among all heads' rows
  int64_t taken;
  T score;
  int code;

  __device__ bool is_later(T other_score, int other_code) const {
    return other_score < score || (other_score == score && other_code > code);
  }
};

// Writes what is known now of a row's codes, in their order.
template <class T>
__device__ inline void take(const Arguments<T>& p, List<T>& list, Progress<T>* row) {
  const int lane = threadIdx.x % kWarpSize;
  int dropped = 0;
  bool complete = true;
  while (row->taken < p.k && complete) {
    T score = list.score[0];
    int code = list.code[0];
#pragma unroll
    for (int other = 1; other < kWarpSize; other *= 2) {
      const T other_score = __shfl_xor_sync(kFullWarp, score, other);
      const int other_code = __shfl_xor_sync(kFullWarp, code, other);
      if (other_score > score || (other_score == score && other_code < code)) {
        score = other_score;
        code = other_code;
      }
    }
    const bool found = score > -kInf<T>;
    const int64_t left = found ? 1 : p.k - row->taken;  // nothing follows a code that is missing
    for (int64_t i = lane; i < left; i += kWarpSize) {
      p.scores[row->at * p.k + row->taken + i] = score;
      p.indices[row->at * p.k + row->taken + i] = found ? code : -1;
    }
    row->taken += left;
    row->score = score;
    row->code = code;
    if (found && list.code[0] == code) {
      list.drop_first();
      ++dropped;
    }
    complete = __ballot_sync(kFullWarp, dropped == kListLength) == 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) topk(const Arguments<T> p) {
  const int64_t head = blockIdx.x / p.row_blocks, row_begin = blockIdx.x % p.row_blocks * kRows;
  const int64_t rows_left = p.rows - row_begin;
  const T* z = p.z + (head * p.rows + row_begin) * p.dim;
  const T* codes = p.codes + head * p.num_codes * p.dim;
  const T* bias = p.bias + head * p.bias_pitch;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  T* shared_rows = reinterpret_cast<T*>(vqkernels_shared);  // [columns, row pitch]
  T* shared_codes = shared_rows + kColumns * kRowPitch;     // [columns, code pitch]

  Progress<T> progress[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = warp * kWarpRows + r;
    const int64_t at = head * p.rows + row_begin + row;
    const bool exists = row < rows_left;
    progress[r] = {at, exists ? 0 : p.k, kInf<T>, -1};
    if (!exists || p.row_valid[at]) continue;
    for (int64_t i = lane; i < p.k; i += kWarpSize) {
      p.scores[at * p.k + i] = -kInf<T>;
      p.indices[at * p.k + i] = -1;
    }
    progress[r].taken = p.k;
  }

  while (true) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) any = any || progress[r].taken < p.k;
    if (__syncthreads_or(any) == 0) return;

    List<T> lists[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) lists[r].clear();
    for (int first = 0; first < p.num_codes; first += kWarpSize) {
      T chains[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) chains[r] = bias[first + lane];
      for (int64_t begin = 0; begin < p.dim; begin += kColumns) {
        // Products of padding are -0, the one number that leaves every sum as it is.
        __syncthreads();
        const int64_t d = begin + lane;
        for (int line = warp; line < kRows; line += kWarps) {
          shared_rows[lane * kRowPitch + line] = d >= p.dim ? T(-0.0) : line < rows_left ? z[line * p.dim + d] : T(0);
        }
        for (int line = warp; line < kWarpSize; line += kWarps) {
          const int k = first + line < p.num_codes ? first + line : p.num_codes - 1;
          shared_codes[lane * kCodePitch + line] = d < p.dim ? codes[k * p.dim + d] : T(0);
        }
        __syncthreads();
#pragma unroll 8
        for (int column = 0; column < kColumns; ++column) {
          const T code = shared_codes[column * kCodePitch + lane];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            chains[r] = fused(shared_rows[column * kRowPitch + warp * kWarpRows + r], code, chains[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        if (progress[r].is_later(chains[r], first + lane)) lists[r].insert(chains[r], first + lane);
      }
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) take(p, lists[r], &progress[r]);
  }
}

template <class T>
struct Plan {
  int64_t bias_pitch;
  T* bias;
  T* normalised = nullptr;
  bool* row_valid;
  int64_t bytes;

  Plan(const NearestCodeProblem& p, void* workspace) : bias_pitch(ceil_div(p.codes, kNormThreads) * kNormThreads) {
    Workspace memory(workspace);
    bias = memory.take<T>(p.heads * bias_pitch);
    if (p.metric == Metric::cosine) normalised = memory.take<T>(p.heads * p.codes * p.dim);
    row_valid = memory.take<bool>(p.heads * p.rows);
    bytes = memory.bytes();
  }
};

template <class T>
void topk_codes(const NearestCodeProblem& p, int64_t k, void* workspace, T* scores, int64_t* indices,
                cudaStream_t stream) {
  if (p.codes > kMaxCodes) throw std::invalid_argument("topk_codes: expected at most 2^30 codes");
  const Plan<T> plan(p, workspace);
  const T* z = static_cast<const T*>(p.z);
  const T* codebook = static_cast<const T*>(p.codebook);
  const int64_t rows = p.heads * p.rows;
  launch(check_rows<T>, ceil_div(rows, kNormThreads), kNormThreads, kNormSharedBytes<T>, stream, z, p.mask, rows, p.dim,
         plan.row_valid);
  launch(prepare_codes<T>, p.heads * plan.bias_pitch / kNormThreads, kNormThreads, kNormSharedBytes<T>, stream,
         codebook, p.metric, p.codes, p.dim, plan.bias_pitch, plan.bias, plan.normalised);
  Arguments<T> arguments{};
  arguments.z = z;
  arguments.codes = plan.normalised != nullptr ? plan.normalised : codebook;
  arguments.bias = plan.bias;
  arguments.row_valid = plan.row_valid;
  arguments.rows = p.rows;
  arguments.num_codes = static_cast<int>(p.codes);
  arguments.dim = p.dim;
  arguments.k = k;
  arguments.bias_pitch = plan.bias_pitch;
  arguments.row_blocks = ceil_div(p.rows, kRows);
  arguments.scores = scores;
  arguments.indices = indices;
  launch(topk<T>, p.heads * arguments.row_blocks, kThreads, kSharedBytes<T>, stream, arguments);
}

}  // namespace

int64_t topk_codes_workspace(const NearestCodeProblem& p) {
  return p.type == DType::float64 ? Plan<double>(p, nullptr).bytes : Plan<float>(p, nullptr).bytes;
}

void topk_codes(const NearestCodeProblem& p, int64_t k, void* workspace, void* scores, int64_t* indices,
                cudaStream_t stream) {
  if (p.rows == 0 || p.heads == 0) return;
  if (p.type == DType::float64) {
    topk_codes(p, k, workspace, static_cast<double*>(scores), indices, stream);
  } else {
    topk_codes(p, k, workspace, static_cast<float*>(scores), indices, stream);
  }
}

}  // namespace vqkernels::cuda
