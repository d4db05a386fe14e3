// A block scores a tile of rows against one tile of codes after the other. Slices of both tiles lie in shared memory,
// transposed and double-buffered; a thread holds the chains of 8 x 8 pairs (float) in registers and, between tiles of
// codes, nothing: what is best so far lies in shared memory. Threads that share rows compare at the end. Where rows are
// too few to fill the device the codes are split as well, and a last kernel compares the parts. Codes always come in
// ascending order, so that a strict comparison settles ties.
#include "nearest_code.h"

#include <algorithm>
#include <limits>

#include "fixed_order.h"
#include "launch.h"
#include "nearest_code_tile.h"

namespace vqkernels::cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;
// Up to here a tile is low and wide, so that few of its rows are padding.
constexpr int64_t kFewRows = 32;
constexpr int64_t kMaxSplitCodes = int64_t{1} << 30;

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kMaxNorm = std::numeric_limits<T>::max() / 4;

template <class T>
using SquareTile = Tile<T, 4, 2>;  // float: 128 rows x 128 codes
template <class T>
using WideTile = Tile<T, 2, 1>;  // float: 32 rows x 256 codes

template <class T>
struct SearchArguments {
  const T* z;
  const T* codes;
  const T* bias;  // [heads, bias_pitch], NaN for invalid codes and behind the last
  const bool* row_valid;
  int64_t heads;
  int64_t rows;
  int64_t num_codes;
  int64_t dim;
  int64_t bias_pitch;
  int64_t row_blocks;
  int64_t splits;
  int64_t split_codes;  // a multiple of the tile
  bool vectors;         // rows and codes begin at multiples of 16 bytes
  T* scores;            // [splits, heads, rows]
  int64_t* indices;
};

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Takes a candidate that is better, or as good with a lower index.
template <class T, class Index>
__device__ inline void take_better(T score, Index index, T* best, Index* best_index) {
  if (score > *best || (score == *best && index < *best_index)) {
    *best = score;
    *best_index = index;
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) search(SearchArguments<T> p) {
  constexpr int kThreadRows = Tile::thread_rows, kThreadCodes = Tile::thread_codes;

  const int64_t split = blockIdx.x % p.splits, block = blockIdx.x / p.splits;
  const int64_t head = block / p.row_blocks, row_begin = block % p.row_blocks * Tile::rows;
  const int64_t code_begin = split * p.split_codes, codes_left = p.num_codes - code_begin;
  const int codes = static_cast<int>(p.split_codes < codes_left ? p.split_codes : codes_left);
  const int64_t rows_left = p.rows - row_begin;
  const T* bias = p.bias + head * p.bias_pitch + code_begin;
  const int slices = static_cast<int>(ceil_div(p.dim, kSlice));
  const int tiles = static_cast<int>(ceil_div(codes, Tile::codes));
  const bool half_slice = p.dim - (slices - 1) * kSlice <= kSlice / 2;

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = warp / Tile::warp_columns, warp_column = warp % Tile::warp_columns;
  const int row_offset = warp_row * 4 * kThreadRows + lane / 8 * Tile::vector;
  const int code_offset = warp_column * 8 * kThreadCodes + lane % 8 * Tile::vector;
  const auto row_of = [&](int i) { return row_offset + i / Tile::vector * 4 * Tile::vector + i % Tile::vector; };
  const auto code_of = [&](int j) { return code_offset + j / Tile::vector * 8 * Tile::vector + j % Tile::vector; };

  // Two buffers of [kSlice, row_pitch] rows and [kSlice, code_pitch] codes, then what a thread needs only once a tile:
  // the best score and code of its rows, both [thread_rows, threads].
  T* rows_shared = reinterpret_cast<T*>(vqkernels_shared);
  T* codes_shared = rows_shared + kSlice * Tile::row_pitch;
  T* best_scores = rows_shared + 2 * Tile::buffer + threadIdx.x;
  int* best_codes = reinterpret_cast<int*>(rows_shared + 2 * Tile::buffer + kThreadRows * kThreads) + threadIdx.x;
  for (int i = 0; i < kThreadRows; ++i) {
    best_scores[i * kThreads] = -kInf<T>;
    best_codes[i * kThreads] = -1;  // counts from code_begin
  }

  Loader<T, Tile> loader(p.z + (head * p.rows + row_begin) * p.dim, rows_left,
                         p.codes + (head * p.num_codes + code_begin) * p.dim, codes, static_cast<int>(p.dim),
                         p.vectors);
  loader.load();
  loader.store(rows_shared, codes_shared);
  __syncthreads();
  int buffer = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    T chains[kThreadRows][kThreadCodes];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Vector<T> v =
          *reinterpret_cast<const Vector<T>*>(bias + int64_t{tile} * Tile::codes + code_of(n * Tile::vector));
#pragma unroll
      for (int j = 0; j < Tile::vector; ++j) {
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) chains[i][n * Tile::vector + j] = v.x[j];
      }
    }
    for (int slice = 1; slice <= slices; ++slice) {
      const bool more = slice < slices || tile + 1 < tiles;
      if (slice < slices) {
        loader.next_slice();
      } else {
        loader.next_tile(tile + 1);
      }
      if (more) loader.load();
      const T* rows = rows_shared + buffer + row_offset;
      const T* columns = codes_shared + buffer + code_offset;
      if (slice == slices && half_slice) {
        multiply<Tile, kSlice / 2>(rows, columns, chains);
      } else {
        multiply<Tile, kSlice>(rows, columns, chains);
      }
      buffer = Tile::buffer - buffer;
      if (more) loader.store(rows_shared + buffer, codes_shared + buffer);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      T tile_best = chains[i][0];
#pragma unroll
      for (int j = 1; j < kThreadCodes; ++j) tile_best = larger(tile_best, chains[i][j]);  // passes over NaN
      if (tile_best > best_scores[i * kThreads]) {
        // Which code it is is looked for only now; zeros of both signs are equal, the first one's score counts.
        T score = tile_best;
        int code = 0;
#pragma unroll
        for (int j = kThreadCodes - 1; j >= 0; --j) {
          if (chains[i][j] == tile_best) {
            score = chains[i][j];
            code = code_of(j);
          }
        }
        best_scores[i * kThreads] = score;
        best_codes[i * kThreads] = tile * Tile::codes + code;
      }
    }
  }

  T* warp_best = rows_shared;  // [warp_columns, rows]
  int* warp_code = reinterpret_cast<int*>(warp_best + Tile::warp_columns * Tile::rows);
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    T best = best_scores[i * kThreads];
    int best_code = best_codes[i * kThreads];
#pragma unroll
    for (int other = 1; other < 8; other *= 2) {
      const T score = __shfl_xor_sync(kFullWarp, best, other);
      const int code = __shfl_xor_sync(kFullWarp, best_code, other);
      take_better(score, code, &best, &best_code);
    }
    if (lane % 8 == 0) {
      warp_best[warp_column * Tile::rows + row_of(i)] = best;
      warp_code[warp_column * Tile::rows + row_of(i)] = best_code;
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= Tile::rows || row >= rows_left) return;
  T score = warp_best[row];
  int code = warp_code[row];
  for (int column = 1; column < Tile::warp_columns; ++column) {
    take_better(warp_best[column * Tile::rows + row], warp_code[column * Tile::rows + row], &score, &code);
  }
  const int64_t at = head * p.rows + row_begin + row;
  const bool found = p.row_valid[at] && code >= 0;
  p.scores[split * p.heads * p.rows + at] = found ? score : -kInf<T>;
  p.indices[split * p.heads * p.rows + at] = found ? code_begin + code : -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_splits(const T* part_scores, const int64_t* part_indices,
                                                         int64_t splits, int64_t rows, T* scores, int64_t* indices) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= rows) return;
  T best = part_scores[row];
  int64_t best_index = part_indices[row];
  for (int64_t split = 1; split < splits; ++split) {
    const T score = part_scores[split * rows + row];
    if (score > best) {
      best = score;
      best_index = part_indices[split * rows + row];
    }
  }
  scores[row] = best;
  indices[row] = best_index;
}

constexpr int kNormThreads = 128;
constexpr int kNormColumns = 32;

template <class T>
constexpr int64_t kNormSharedBytes = kNormThreads * (kNormColumns + 2) * static_cast<int64_t>(sizeof(T));

// q of line threadIdx.x of x [lines, dim] (0 from lines on), through shared memory so that global loads coalesce.
template <class T>
__device__ inline T squared_norm(const T* x, int64_t lines, int64_t dim) {
  T* shared = reinterpret_cast<T*>(vqkernels_shared);
  T q = 0;
  for (int64_t first = 0; first < dim; first += kNormColumns) {
    const int64_t left = dim - first;
    __syncthreads();
    for (int i = threadIdx.x; i < kNormThreads * kNormColumns; i += kNormThreads) {
      const int line = i / kNormColumns, d = i % kNormColumns;
      shared[line * (kNormColumns + 1) + d] = line < lines && d < left ? x[line * dim + first + d] : T(0);
    }
    __syncthreads();
    const T* own = shared + threadIdx.x * (kNormColumns + 1);
    for (int d = 0; d < kNormColumns && d < left; ++d) q = fused(own[d], own[d], q);
  }
  return q;
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    check_rows(const T* z, const bool* mask, int64_t rows, int64_t dim, bool* row_valid) {
  const int64_t first = int64_t{blockIdx.x} * kNormThreads, row = first + threadIdx.x;
  const T q = squared_norm(z + first * dim, rows - first, dim);
  if (row < rows) row_valid[row] = q <= kMaxNorm<T> && (mask == nullptr || mask[row]);
}

__device__ inline float root(float x) { return __fsqrt_rn(x); }
__device__ inline double root(double x) { return __dsqrt_rn(x); }

// Biases of the codes and, where normalised is not null, the codes divided by their norms.
template <class T>
__global__ void __launch_bounds__(kNormThreads) prepare_codes(const T* codebook, Metric metric, int64_t codes,
                                                              int64_t dim, int64_t bias_pitch, T* bias, T* normalised) {
  const int64_t blocks = bias_pitch / kNormThreads;
  const int64_t head = blockIdx.x / blocks, first = blockIdx.x % blocks * kNormThreads;
  const int64_t lines = codes - first, offset = (head * codes + first) * dim;
  const T q = squared_norm(codebook + offset, lines, dim);
  const bool valid = static_cast<int64_t>(threadIdx.x) < lines && q <= kMaxNorm<T>;
  const T value = metric == Metric::l2 ? -q / 2 : T(0);
  bias[head * bias_pitch + first + threadIdx.x] = valid ? value : kNaN<T>;
  if (normalised == nullptr) return;
  T* divisors = reinterpret_cast<T*>(vqkernels_shared) + kNormThreads * (kNormColumns + 1);
  divisors[threadIdx.x] = valid && q > 0 ? root(q) : T(1);
  __syncthreads();
  for (int line = threadIdx.x / kWarpSize; line < kNormThreads && line < lines; line += kNormThreads / kWarpSize) {
    for (int64_t d = threadIdx.x % kWarpSize; d < dim; d += kWarpSize) {
      normalised[offset + line * dim + d] = codebook[offset + line * dim + d] / divisors[line];
    }
  }
}

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Work memory and the shape of the launch.
template <class T>
struct Plan {
  bool few_rows;
  int64_t row_blocks;
  int64_t splits;
  int64_t split_codes;
  int64_t bias_pitch;
  T* bias;
  T* normalised = nullptr;
  bool* row_valid;
  T* part_scores;
  int64_t* part_indices;
  int64_t bytes;

  Plan(const NearestCodeProblem& p, void* workspace) {
    few_rows = p.rows <= kFewRows;
    const int64_t tile_rows = few_rows ? WideTile<T>::rows : SquareTile<T>::rows;
    const int64_t tile_codes = few_rows ? WideTile<T>::codes : SquareTile<T>::codes;
    row_blocks = ceil_div(p.rows, tile_rows);
    const int64_t tiles = ceil_div(p.codes, tile_codes);
    split_codes = choose_split(p.heads * row_blocks, tiles, kMaxSplitCodes / tile_codes) * tile_codes;
    splits = ceil_div(p.codes, split_codes);
    bias_pitch =
        ceil_div(p.codes, std::max<int64_t>(tile_codes, kNormThreads)) * std::max<int64_t>(tile_codes, kNormThreads);
    Workspace memory(workspace);
    bias = memory.take<T>(p.heads * bias_pitch);
    if (p.metric == Metric::cosine) normalised = memory.take<T>(p.heads * p.codes * p.dim);
    row_valid = memory.take<bool>(p.heads * p.rows);
    const int64_t parts = splits == 1 ? 0 : splits * p.heads * p.rows;
    part_scores = memory.take<T>(parts);
    part_indices = memory.take<int64_t>(parts);
    bytes = memory.bytes();
  }

  // Tiles of codes a block, so that the blocks take the least time: rounds of blocks x (tiles + a tile's worth of
  // beginning and end). At most a few rounds come of splitting, which bounds the parts.
  static int64_t choose_split(int64_t blocks, int64_t tiles, int64_t max_tiles) {
    const int64_t slots = int64_t{kBlocksPerProcessor} * multiprocessors();
    const int64_t max_splits = std::min(tiles, std::max<int64_t>(1, 4 * slots / std::max<int64_t>(1, blocks)));
    int64_t chosen = tiles, least = std::numeric_limits<int64_t>::max();
    for (int64_t n = 1; n <= max_splits; ++n) {
      const int64_t split_tiles = ceil_div(tiles, n);
      const int64_t cost = ceil_div(blocks * ceil_div(tiles, split_tiles), slots) * (split_tiles + 1);
      if (cost < least) {
        least = cost;
        chosen = split_tiles;
      }
    }
    return std::min(chosen, max_tiles);
  }
};

template <class Tile, class T>
void launch_search(const SearchArguments<T>& arguments, cudaStream_t stream) {
  launch(search<T, Tile>, arguments.heads * arguments.row_blocks * arguments.splits, kThreads, Tile::shared_bytes,
         stream, arguments);
}

bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

template <class T>
void nearest_code(const NearestCodeProblem& p, void* workspace, T* scores, int64_t* indices, cudaStream_t stream) {
  if (p.dim > INT32_MAX) check(cudaErrorInvalidValue);
  const Plan<T> plan(p, workspace);
  const T* z = static_cast<const T*>(p.z);
  const T* codebook = static_cast<const T*>(p.codebook);
  const int64_t rows = p.heads * p.rows;
  launch(check_rows<T>, ceil_div(rows, kNormThreads), kNormThreads, kNormSharedBytes<T>, stream, z, p.mask, rows, p.dim,
         plan.row_valid);
  launch(prepare_codes<T>, p.heads * plan.bias_pitch / kNormThreads, kNormThreads, kNormSharedBytes<T>, stream,
         codebook, p.metric, p.codes, p.dim, plan.bias_pitch, plan.bias, plan.normalised);
  SearchArguments<T> arguments{};
  arguments.z = z;
  arguments.codes = plan.normalised != nullptr ? plan.normalised : codebook;
  arguments.bias = plan.bias;
  arguments.row_valid = plan.row_valid;
  arguments.heads = p.heads;
  arguments.rows = p.rows;
  arguments.num_codes = p.codes;
  arguments.dim = p.dim;
  arguments.bias_pitch = plan.bias_pitch;
  arguments.row_blocks = plan.row_blocks;
  arguments.splits = plan.splits;
  arguments.split_codes = plan.split_codes;
  arguments.vectors = p.dim % Vector<T>::size == 0 && is_aligned(z) && is_aligned(arguments.codes);
  arguments.scores = plan.splits == 1 ? scores : plan.part_scores;
  arguments.indices = plan.splits == 1 ? indices : plan.part_indices;
  plan.few_rows ? launch_search<WideTile<T>>(arguments, stream) : launch_search<SquareTile<T>>(arguments, stream);
  if (plan.splits > 1) {
    launch(merge_splits<T>, ceil_div(rows, kThreads), kThreads, 0, stream, plan.part_scores, plan.part_indices,
           plan.splits, rows, scores, indices);
  }
}

}  // namespace

int64_t nearest_code_workspace(const NearestCodeProblem& p) {
  return p.type == DType::float64 ? Plan<double>(p, nullptr).bytes : Plan<float>(p, nullptr).bytes;
}

void nearest_code(const NearestCodeProblem& p, void* workspace, void* scores, int64_t* indices, cudaStream_t stream) {
  if (p.rows == 0 || p.heads == 0) return;
  if (p.type == DType::float64) {
    nearest_code(p, workspace, static_cast<double*>(scores), indices, stream);
  } else {
    nearest_code(p, workspace, static_cast<float*>(scores), indices, stream);
  }
}

}  // namespace vqkernels::cuda
