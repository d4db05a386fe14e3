// A block searches the codes for a tile of rows (nearest_code_tile.h). Where rows are too few to fill the device the
// codes are split as well, and a last kernel compares the parts, in ascending order of their codes.
#include "nearest_code.h"

#include <algorithm>
#include <limits>

#include "fixed_order.h"
#include "launch.h"
#include "nearest_code_tile.h"
#include "prepare_codes.h"

namespace vqkernels::cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;
// Up to here a tile is low and wide, so that few of its rows are padding.
constexpr int64_t kFewRows = 32;
constexpr int64_t kMaxSplitCodes = int64_t{1} << 30;

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

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) search(SearchArguments<T> p) {
  const int64_t split = blockIdx.x % p.splits, block = blockIdx.x / p.splits;
  const int64_t head = block / p.row_blocks, row_begin = block % p.row_blocks * Tile::rows;
  const int64_t code_begin = split * p.split_codes, codes_left = p.num_codes - code_begin;
  const int codes = static_cast<int>(p.split_codes < codes_left ? p.split_codes : codes_left);
  const int64_t rows_left = p.rows - row_begin;
  Loader<T, Tile> loader(p.z + (head * p.rows + row_begin) * p.dim, rows_left,
                         p.codes + (head * p.num_codes + code_begin) * p.dim, codes, static_cast<int>(p.dim),
                         p.vectors);
  const Best<T> best =
      search_tile<Tile>(loader, static_cast<const T*>(nullptr), p.bias + head * p.bias_pitch + code_begin);
  const int row = threadIdx.x;
  if (row >= Tile::rows || row >= rows_left) return;
  const int64_t at = head * p.rows + row_begin + row;
  const bool found = p.row_valid[at] && best.code >= 0;
  p.scores[split * p.heads * p.rows + at] = found ? best.score : -kInf<T>;
  p.indices[split * p.heads * p.rows + at] = found ? code_begin + best.code : -1;
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
    const int64_t slots = int64_t{kBlocksPerProcessor} * device_attribute(cudaDevAttrMultiProcessorCount);
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
