// A block takes its rows through all levels: it searches a level (nearest_code_tile.h), subtracts, and goes on. The
// residual rows stay in shared memory, or in work memory where they are too long. The sum of the codes is gathered at
// the end, when the indices are known. A last kernel adds up the errors, in the order of the contract.
#include "residual_quantize.h"

#include <algorithm>
#include <stdexcept>

#include "fixed_order.h"
#include "launch.h"
#include "nearest_code_tile.h"
#include "prepare_codes.h"
#include "residual_rows.h"

namespace vqkernels::cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;
constexpr int64_t kMaxLevelCodes = int64_t{1} << 30;
constexpr int64_t kReservedSharedBytes = 1024;  // of a processor's memory, for each block

template <class T>
using TallTile = Tile<T, 2, 2, true>;  // float: 64 rows x 256 codes
template <class T, bool ResidentRows>
using LowTile = Tile<T, 2, 1, ResidentRows>;  // float: 32 rows x 256 codes

template <class T>
struct Arguments {
  ResidualProblem problem;
  const T* codes;  // what is searched: the codebooks, for cosine normalised
  const T* bias;   // [heads, levels, bias_pitch], NaN for invalid codes and behind the last
  int64_t bias_pitch;
  int64_t row_blocks;
  bool vectors;  // rows in work memory and codes begin at multiples of 16 bytes
  T* residual;   // work memory for rows that are not in shared memory
  OwnColumnsPlan own_columns;
  void* quantized;
  int64_t* indices;
  T* errors;  // [heads, levels, rows], -1 for a row without a code

  __device__ int64_t all_codes() const { return problem.levels.begin[problem.levels.count]; }
  __device__ int64_t level_codes(int64_t level) const {
    return problem.levels.begin[level + 1] - problem.levels.begin[level];
  }
  // Where the codes of a level begin in the codebooks.
  __device__ int64_t level_at(int64_t head, int64_t level) const {
    return (head * all_codes() + problem.levels.begin[level]) * problem.dim;
  }
  // How many levels run for a row, of all heads' rows.
  __device__ int64_t levels_of(int64_t row) const {
    if (problem.mask != nullptr && !problem.mask[row]) return 0;
    if (problem.num_levels == nullptr) return problem.levels.count;
    const int64_t levels = problem.num_levels[row];
    return levels < 0 ? 0 : levels < problem.levels.count ? levels : problem.levels.count;
  }
};

template <class T>
__global__ void __launch_bounds__(kNormThreads) prepare_levels(const Arguments<T> p, T* bias, T* normalised) {
  const int64_t blocks = p.bias_pitch / kNormThreads, levels = p.problem.levels.count;
  const int64_t line = blockIdx.x / blocks, first = blockIdx.x % blocks * kNormThreads;
  const int64_t level = line % levels, left = p.level_codes(level) - first;
  bias += line * p.bias_pitch + first;
  if (left <= 0) {
    bias[threadIdx.x] = kNaN<T>;
    return;
  }
  const int64_t at = p.level_at(line / levels, level) + first * p.problem.dim;
  prepare_lines(static_cast<const T*>(p.problem.codebooks) + at, p.problem.metric, left, p.problem.dim, bias,
                normalised == nullptr ? nullptr : normalised + at);
}

// What half a warp does with a row and its code of a level: residual(d) loses code[d]; the squares of what is left are
// summed for all its threads. Null: no code. Every thread of the warp calls it.
template <class T, class Residual>
__device__ inline T subtract_code(const T* code, int64_t dim, int64_t lane, const Residual& residual) {
  T sum = 0;
  for (int64_t d = code == nullptr ? dim : lane; d < dim; d += kColumnLanes) {
    const T left = residual(d) - code[d];
    residual(d) = left;
    sum = fused(left, left, sum);
  }
  return sum_of_lanes(sum);
}

// Writes the quantized row of half a warp, whose indices are all known.
template <class T>
__device__ inline void write_quantized(const Arguments<T>& p, int64_t head, int64_t row, int64_t lane) {
  const int64_t dim = p.problem.dim, levels = p.levels_of(row);
  const int64_t* indices = p.indices + row * p.problem.levels.count;
  int64_t used = 0;
  while (used < levels && indices[used] >= 0) ++used;
  const T* codebooks = static_cast<const T*>(p.problem.codebooks);
  for (int64_t d = lane; d < dim; d += kColumnLanes) {
    T sum = used < levels ? kNaN<T> : T(0);
    for (int64_t q = 0; q < used && used == levels; ++q) {
      const T code = codebooks[p.level_at(head, q) + indices[q] * dim + d];
      sum = q == 0 ? code : sum + code;
    }
    store(sum, p.problem.z_type, row * dim + d, p.quantized);
  }
}

// The elements of a tile's residual rows.
template <class T, class Tile>
struct TileRows {
  T* rows;  // [dim, row_pitch] in shared memory, or [rows, dim]
  int64_t dim;
  __device__ T& at(int row, int64_t d) const {
    return rows[Tile::resident_rows ? d * Tile::row_pitch + row : row * dim + d];
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) quantize_levels(const Arguments<T> p) {
  const int64_t dim = p.problem.dim, levels = p.problem.levels.count;
  const int64_t head = blockIdx.x / p.row_blocks, row_begin = blockIdx.x % p.row_blocks * Tile::rows;
  const int64_t first = head * p.problem.rows + row_begin, rows_left = p.problem.rows - row_begin;
  const int rows = static_cast<int>(rows_left < Tile::rows ? rows_left : Tile::rows);
  const int thread = static_cast<int>(threadIdx.x), group = thread >> kLog2Lanes, lane = thread % kColumnLanes;
  constexpr int kGroups = kThreads >> kLog2Lanes;

  // Behind what the search needs: the code of every row at the level, how many levels a row runs, the resident rows.
  int* chosen = reinterpret_cast<int*>(vqkernels_shared + Tile::shared_bytes);
  int* row_levels = chosen + Tile::rows;
  T* resident = reinterpret_cast<T*>(row_levels + Tile::rows);
  const TileRows<T, Tile> residual{Tile::resident_rows ? resident : p.residual + first * dim, dim};

  if (thread < Tile::rows) row_levels[thread] = thread < rows ? static_cast<int>(p.levels_of(first + thread)) : 0;
  // Padding is zero, rows and columns alike.
  const int64_t columns = Tile::resident_rows ? ceil_div(dim, kSlice / 2) * (kSlice / 2) : dim;
  for (int row = group; row < (Tile::resident_rows ? Tile::rows : rows); row += kGroups) {
    for (int64_t d = lane; d < columns; d += kColumnLanes) {
      const bool exists = row < rows && d < dim;
      residual.at(row, d) = exists ? load<T>(p.problem.z, p.problem.z_type, (first + row) * dim + d) : T(0);
    }
  }
  __syncthreads();
  int running = 0;  // levels that any row runs
  for (int row = 0; row < rows; ++row) running = row_levels[row] > running ? row_levels[row] : running;

  for (int level = 0; level < running; ++level) {
    const int codes = static_cast<int>(p.level_codes(level));
    Loader<T, Tile> loader(residual.rows, rows, p.codes + p.level_at(head, level), codes, static_cast<int>(dim),
                           p.vectors);
    const Best<T> best = search_tile<Tile>(loader, resident, p.bias + (head * levels + level) * p.bias_pitch);
    if (thread < rows) {
      const int row = thread;
      int code = -1;
      if (level < row_levels[row] && best.code >= 0) {
        T q = 0;
#pragma unroll 8
        for (int64_t d = 0; d < dim; ++d) q = fused(residual.at(row, d), residual.at(row, d), q);
        if (q <= kMaxNorm<T>) code = best.code;
      }
      if (code < 0) row_levels[row] = 0;
      chosen[row] = code;
      p.indices[(first + row) * levels + level] = code;
    }
    __syncthreads();
    const T* codebook = static_cast<const T*>(p.problem.codebooks) + p.level_at(head, level);
    for (int begin = 0; begin < rows; begin += kGroups) {
      const int row = begin + group;
      const int code = row < rows ? chosen[row] : -1;
      const T error = subtract_code(code < 0 ? nullptr : codebook + code * dim, dim, lane,
                                    [&](int64_t d) -> T& { return residual.at(row, d); });
      if (row < rows && lane == 0) {
        p.errors[(head * levels + level) * p.problem.rows + row_begin + row] = code < 0 ? T(-1) : error;
      }
    }
    __syncthreads();
  }
  if (thread < rows) {
    for (int64_t level = running; level < levels; ++level) {
      p.indices[(first + thread) * levels + level] = -1;
      p.errors[(head * levels + level) * p.problem.rows + row_begin + thread] = T(-1);
    }
  }
  __syncthreads();
  for (int row = group; row < rows; row += kGroups) write_quantized(p, head, first + row, lane);
}

// The same with known codes. Half a warp a row; no thread leaves early, for the sums need whole warps: rows from the
// last one on repeat it and write nothing.
template <class T>
__global__ void __launch_bounds__(kThreads) follow_levels(const Arguments<T> p) {
  const RowGroup group{kLog2Lanes};
  const int64_t dim = p.problem.dim, levels = p.problem.levels.count, rows = p.problem.heads * p.problem.rows;
  const bool exists = group.row() < rows;
  const int64_t row = exists ? group.row() : rows - 1, lane = group.lane();
  const int64_t head = row / p.problem.rows, head_row = row % p.problem.rows;
  const OwnColumns<T> residual = p.own_columns.array(0, p.residual);
  for (int64_t d = lane; d < dim; d += kColumnLanes)
    residual(d) = load<T>(p.problem.z, p.problem.z_type, row * dim + d);
  int64_t running = p.levels_of(row);
  for (int64_t level = 0; level < levels; ++level) {
    int64_t code = level < running ? p.problem.known[row * levels + level] : -1;
    if (code < 0 || code >= p.level_codes(level)) code = -1;
    if (code < 0) running = 0;
    const T* codebook = static_cast<const T*>(p.problem.codebooks) + p.level_at(head, level);
    const T error = subtract_code(code < 0 ? nullptr : codebook + code * dim, dim, lane, residual);
    if (exists && lane == 0) {
      p.indices[row * levels + level] = code;
      p.errors[(head * levels + level) * p.problem.rows + head_row] = code < 0 ? T(-1) : error;
    }
  }
  __syncwarp();
  if (exists) write_quantized(p, head, row, lane);
}

// A block for each level of each head.
template <class T>
__global__ void __launch_bounds__(kRowLanes)
    mean_errors(const T* errors, int64_t rows, int64_t dim, T* mse, int64_t* valid_rows) {
  double* lanes = reinterpret_cast<double*>(vqkernels_shared);
  errors += blockIdx.x * rows;
  int64_t counted = 0;
  const double sum = column_sum(rows, lanes, [&](int64_t i) {
    const T error = errors[i];
    counted += !(error < 0);
    return error < 0 ? T(0) : error;
  });
  __syncthreads();
  const double valid = column_sum(kRowLanes, lanes, [&](int64_t) { return static_cast<double>(counted); });
  if (threadIdx.x != 0) return;
  valid_rows[blockIdx.x] = static_cast<int64_t>(valid);
  mse[blockIdx.x] = static_cast<T>(valid > 0 ? sum / (valid * static_cast<double>(dim)) : 0.0);
}

// Work memory and the shape of the launch.
template <class T>
struct Plan {
  bool tall = false;
  bool resident = false;
  int64_t row_blocks = 0;
  int64_t shared_bytes = 0;
  int64_t bias_pitch = 0;
  OwnColumnsPlan own_columns;
  T* bias = nullptr;
  T* normalised = nullptr;
  T* errors;
  T* residual = nullptr;
  int64_t bytes;

  Plan(const ResidualProblem& p, void* workspace) : own_columns(p.dim, 1, sizeof(T)) {
    const int64_t codes = p.levels.begin[p.levels.count];
    Workspace memory(workspace);
    errors = memory.take<T>(p.heads * p.levels.count * p.rows);
    if (p.known != nullptr) {
      if (own_columns.shared_bytes == 0) residual = memory.take<T>(own_columns.values(p.heads * p.rows));
    } else {
      choose_tile(p);
      if (!resident) residual = memory.take<T>(p.heads * p.rows * p.dim);
      int64_t most = 0;
      for (int64_t q = 0; q < p.levels.count; ++q) most = std::max(most, p.levels.begin[q + 1] - p.levels.begin[q]);
      static_assert(TallTile<T>::codes == LowTile<T, true>::codes);
      constexpr int64_t kPitch = std::max<int64_t>(TallTile<T>::codes, kNormThreads);
      bias_pitch = ceil_div(most, kPitch) * kPitch;
      bias = memory.take<T>(p.heads * p.levels.count * bias_pitch);
      if (p.metric == Metric::cosine) normalised = memory.take<T>(p.heads * codes * p.dim);
    }
    bytes = memory.bytes();
  }

  // The tile with which the busiest processor has less to do; a low one loads three vectors where a tall one loads two.
  // Rows are resident where a processor then still holds kBlocksPerProcessor blocks.
  void choose_tile(const ResidualProblem& p) {
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t available = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocksPerProcessor;
    const auto rows_of_one = [&](int64_t rows) {
      return ceil_div(p.heads * ceil_div(p.rows, rows), processors) * rows;
    };
    tall = 2 * rows_of_one(TallTile<T>::rows) <= 3 * rows_of_one(LowTile<T, true>::rows) &&
           shared_bytes_of<TallTile<T>>(p.dim) + kReservedSharedBytes <= available;
    resident = tall || shared_bytes_of<LowTile<T, true>>(p.dim) + kReservedSharedBytes <= available;
    row_blocks = ceil_div(p.rows, tall ? TallTile<T>::rows : LowTile<T, true>::rows);
    shared_bytes = tall       ? shared_bytes_of<TallTile<T>>(p.dim)
                   : resident ? shared_bytes_of<LowTile<T, true>>(p.dim)
                              : shared_bytes_of<LowTile<T, false>>(p.dim);
  }

  template <class Tile>
  static int64_t shared_bytes_of(int64_t dim) {
    const int64_t columns = Tile::resident_rows ? ceil_div(dim, kSlice / 2) * (kSlice / 2) : 0;
    return Tile::shared_bytes + 2 * Tile::rows * static_cast<int64_t>(sizeof(int)) +
           columns * Tile::row_pitch * static_cast<int64_t>(sizeof(T));
  }
};

template <class T>
void launch_search(const Plan<T>& plan, const Arguments<T>& arguments, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch(kernel, arguments.problem.heads * plan.row_blocks, kThreads, plan.shared_bytes, stream, arguments);
  };
  if (plan.tall) return run(quantize_levels<T, TallTile<T>>);
  plan.resident ? run(quantize_levels<T, LowTile<T, true>>) : run(quantize_levels<T, LowTile<T, false>>);
}

template <class T>
void quantize(const ResidualProblem& p, void* workspace, void* quantized, int64_t* indices, T* mse, int64_t* valid_rows,
              cudaStream_t stream) {
  if (p.dim > INT32_MAX) check(cudaErrorInvalidValue);
  const Plan<T> plan(p, workspace);
  const T* codebooks = static_cast<const T*>(p.codebooks);
  const T* codes = plan.normalised != nullptr ? plan.normalised : codebooks;
  const bool vectors = p.dim % Vector<T>::size == 0 && is_aligned(codes);
  const Arguments<T> arguments{p,          codes,         plan.bias,        plan.bias_pitch, plan.row_blocks,
                               vectors,    plan.residual, plan.own_columns, quantized,       indices,
                               plan.errors};
  if (p.rows > 0 && p.known != nullptr) {
    launch(follow_levels<T>, plan.own_columns.blocks(p.heads * p.rows), plan.own_columns.threads,
           plan.own_columns.shared_bytes, stream, arguments);
  } else if (p.rows > 0) {
    launch(prepare_levels<T>, p.heads * p.levels.count * (plan.bias_pitch / kNormThreads), kNormThreads,
           kNormSharedBytes<T>, stream, arguments, plan.bias, plan.normalised);
    launch_search(plan, arguments, stream);
  }
  launch(mean_errors<T>, p.heads * p.levels.count, kRowLanes, kRowLanes * sizeof(double), stream, plan.errors, p.rows,
         p.dim, mse, valid_rows);
}

}  // namespace

Levels make_levels(const int64_t* sizes, int64_t count) {
  if (count < 1 || count > kMaxLevels) throw std::invalid_argument("residual_quantize: expected 1 to 256 levels");
  Levels levels{count, {}};
  for (int64_t q = 0; q < count; ++q) {
    if (sizes[q] < 1 || sizes[q] > kMaxLevelCodes) {
      throw std::invalid_argument("residual_quantize: expected 1 to 2^30 codes a level");
    }
    levels.begin[q + 1] = levels.begin[q] + sizes[q];
  }
  return levels;
}

int64_t residual_quantize_workspace(const ResidualProblem& p) {
  return p.z_type == DType::float64 ? Plan<double>(p, nullptr).bytes : Plan<float>(p, nullptr).bytes;
}

void residual_quantize(const ResidualProblem& p, void* workspace, void* quantized, int64_t* indices, void* mse,
                       int64_t* valid_rows, cudaStream_t stream) {
  if (p.z_type == DType::float64) {
    quantize(p, workspace, quantized, indices, static_cast<double*>(mse), valid_rows, stream);
  } else {
    quantize(p, workspace, quantized, indices, static_cast<float*>(mse), valid_rows, stream);
  }
}

}  // namespace vqkernels::cuda
