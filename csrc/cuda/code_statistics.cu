// A stable radix sort brings the rows of a code together, in ascending order. Then threads go along columns: codes of
// one run are summed at once; the runs of larger codes, however many rows one code owns, are summed by threads of their
// own first.
#include "code_statistics.h"

#include <stdexcept>
#include <utility>

#include "../float16.h"
#include "launch.h"

namespace vqkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits == kThreads, "a thread looks after one digit");
constexpr int kItems = 16;  // of a thread
constexpr int kTileItems = kThreads * kItems;
constexpr int kLog2ColumnThreads = 8;

// The rows of all heads with their keys: head * codes + index, or the number of all codes for a row without a code.
struct Items {
  uint32_t* keys;
  int64_t* rows;
};

// Where a pass of the sort reads: the indices themselves in the first, the items of the last pass later on.
struct Source {
  Items items;
  const int64_t* indices;  // null after the first pass
  int64_t rows;            // of a head
  int64_t codes;           // of a head
  int64_t all_rows;
  int64_t all_codes;

  __device__ uint32_t key(int64_t i) const {
    if (indices == nullptr) return items.keys[i];
    const int64_t code = indices[i];
    if (code < 0 || code >= codes) return static_cast<uint32_t>(all_codes);
    return static_cast<uint32_t>((all_codes == codes ? 0 : i / rows * codes) + code);
  }
  __device__ int64_t row(int64_t i) const { return indices == nullptr ? items.rows[i] : i; }
};

__device__ inline int digit_of(uint32_t key, int shift) { return static_cast<int>(key >> shift) & (kDigits - 1); }

// histograms [tiles, digits]: how often each digit occurs in each tile.
__global__ void __launch_bounds__(kThreads) count_digits(Source source, int shift, int64_t* histograms) {
  int* counts = reinterpret_cast<int*>(vqkernels_shared);
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kTileItems;
  for (int n = 0; n < kItems; ++n) {
    const int64_t i = first + n * kThreads + threadIdx.x;
    if (i < source.all_rows) atomicAdd(&counts[digit_of(source.key(i), shift)], 1);
  }
  __syncthreads();
  histograms[int64_t{blockIdx.x} * kDigits + threadIdx.x] = counts[threadIdx.x];
}

// Turns histograms into where the items of a tile with a digit go: behind those of lower digits, in all tiles, and
// those of the same digit in the tiles before. One block, a thread a digit.
__global__ void __launch_bounds__(kThreads) scan_digits(int64_t tiles, int64_t* histograms, int64_t* digit_starts) {
  int64_t* totals = reinterpret_cast<int64_t*>(vqkernels_shared);
  int64_t before = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t count = histograms[tile * kDigits + threadIdx.x];
    histograms[tile * kDigits + threadIdx.x] = before;
    before += count;
  }
  totals[threadIdx.x] = before;
  __syncthreads();
  int64_t start = 0;
  for (int digit = 0; digit < static_cast<int>(threadIdx.x); ++digit) start += totals[digit];
  digit_starts[threadIdx.x] = start;
}

// Moves the items of a tile to their places. Warps own consecutive pieces of the tile and go through them in order.
__global__ void __launch_bounds__(kThreads)
    scatter(Source source, int shift, const int64_t* histograms, const int64_t* digit_starts, Items out) {
  int64_t* starts = reinterpret_cast<int64_t*>(vqkernels_shared);   // [warps, digits]
  int* counts = reinterpret_cast<int*>(starts + kWarps * kDigits);  // [warps, digits]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int* warp_counts = counts + warp * kDigits;
  for (int digit = lane; digit < kDigits; digit += kWarpSize) warp_counts[digit] = 0;
  __syncwarp();

  const int64_t first = int64_t{blockIdx.x} * kTileItems + warp * kItems * kWarpSize + lane;
  uint32_t keys[kItems];
  int ranks[kItems];  // among the warp's items of the same digit
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int64_t i = first + n * kWarpSize;
    const bool exists = i < source.all_rows;
    keys[n] = exists ? source.key(i) : 0;
    const int digit = exists ? digit_of(keys[n], shift) : kDigits;
    const unsigned same = __match_any_sync(kFullWarp, digit);
    const unsigned before = same & ((1u << lane) - 1);
    ranks[n] = (exists ? warp_counts[digit] : 0) + __popc(before);
    __syncwarp();
    if (exists && before == 0) warp_counts[digit] += __popc(same);
    __syncwarp();
  }

  __syncthreads();
  int64_t start = digit_starts[threadIdx.x] + histograms[int64_t{blockIdx.x} * kDigits + threadIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    starts[w * kDigits + threadIdx.x] = start;
    start += counts[w * kDigits + threadIdx.x];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int64_t i = first + n * kWarpSize;
    if (i >= source.all_rows) continue;
    const int64_t at = starts[warp * kDigits + digit_of(keys[n], shift)] + ranks[n];
    out.keys[at] = keys[n];
    out.rows[at] = source.row(i);
  }
}

// The first of n ascending keys that is not below `key`.
__device__ inline int64_t lower_bound(const uint32_t* keys, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where the results of a code, of all heads' codes, are kept.
struct Places {
  int64_t codes;  // of a head
  int64_t pitch;
  __device__ int64_t of(int64_t k) const { return codes == pitch ? k : k / codes * pitch + k % codes; }
};

// offsets [codes + 1]: the members of code k are items offsets[k] to offsets[k + 1].
__global__ void __launch_bounds__(kThreads)
    find_offsets(const uint32_t* keys, int64_t rows, int64_t codes, Places places, int64_t* offsets, int64_t* counts) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k > codes) return;
  const int64_t begin = lower_bound(keys, rows, k);
  offsets[k] = begin;
  if (k < codes) counts[places.of(k)] = lower_bound(keys, rows, k + 1) - begin;
}

// Sum of column d of the rows members[0, count), one after the other.
template <class T, class Z>
__device__ inline T sum_run(const Z* z, const int64_t* members, int64_t count, int64_t dim, int64_t d) {
  T run = 0;
#pragma unroll 8
  for (int64_t m = 0; m < count; ++m) run += widen(z[members[m] * dim + d]);
  return run;
}

// Where the sum of run r of a code is kept. Of all runs of codes with more than one, at most two begin in the same
// kRunLength items: one of the code that owns the first of these items, and the first run of a later code.
__device__ inline int64_t run_slot(int64_t offset, int64_t r) {
  return 2 * (offset / kRunLength + r) + (r == 0 && offset % kRunLength != 0);
}

// Sums of the runs of codes with more than one run. A group of threads a slot.
template <class T, class Z>
__global__ void __launch_bounds__(kThreads) sum_runs(const Z* z, Items items, const int64_t* offsets, int64_t rows,
                                                     int64_t codes, int64_t dim, RowGroup group, T* run_sums) {
  const int64_t slot = group.row(), first = slot / 2 * kRunLength;
  if (first >= rows) return;
  const int64_t last = first + kRunLength < rows ? first + kRunLength - 1 : rows - 1;
  const int64_t k = items.keys[slot % 2 == 0 ? first : last];
  if (k >= codes) return;
  const int64_t begin = offsets[k], end = offsets[k + 1];
  if (end - begin <= kRunLength) return;
  // Both slots may look at the same code; each has the run that begins among these items and is kept in it.
  const int64_t r = begin >= first ? 0 : ceil_div(first - begin, kRunLength);
  const int64_t run_begin = begin + r * kRunLength;
  if (run_begin >= end || run_slot(begin, r) != slot) return;
  const int64_t count = end - run_begin < kRunLength ? end - run_begin : kRunLength;
  for (int64_t d = group.lane(); d < dim; d += group.size()) {
    run_sums[slot * dim + d] = sum_run<T>(z, items.rows + run_begin, count, dim, d);
  }
}

// A group of threads a code.
template <class T, class Z>
__global__ void __launch_bounds__(kThreads)
    sum_codes(const Z* z, Items items, const int64_t* offsets, int64_t codes, Places places, int64_t dim,
              RowGroup group, const T* run_sums, T* sums) {
  const int64_t k = group.row();
  if (k >= codes) return;
  const int64_t begin = offsets[k], count = offsets[k + 1] - begin, out = places.of(k) * dim;
  for (int64_t d = group.lane(); d < dim; d += group.size()) {
    double total = 0;
    if (count <= kRunLength) {
      total += sum_run<T>(z, items.rows + begin, count, dim, d);
    } else {
      const int64_t runs = ceil_div(count, kRunLength);
#pragma unroll 8
      for (int64_t r = 0; r < runs; ++r) total += run_sums[run_slot(begin, r) * dim + d];
    }
    sums[out + d] = static_cast<T>(total);
  }
}

int64_t value_bytes(DType type) { return type == DType::float64 ? 8 : 4; }

struct Plan {
  int64_t rows;   // of all heads
  int64_t codes;  // of all heads
  int64_t tiles;
  int64_t slots;
  Items items[2];
  int64_t* histograms;
  int64_t* digit_starts;
  int64_t* offsets;
  void* run_sums;
  int64_t bytes;

  Plan(const CodeStatisticsProblem& p, void* workspace)
      : rows(p.heads * p.rows),
        codes(p.heads * p.codes),
        tiles(ceil_div(rows, kTileItems)),
        slots(2 * ceil_div(rows, kRunLength)) {
    if (codes >= int64_t{UINT32_MAX}) throw std::invalid_argument("code_statistics: too many codes");
    Workspace memory(workspace);
    for (Items& i : items) i = {memory.take<uint32_t>(rows), memory.take<int64_t>(rows)};
    histograms = memory.take<int64_t>(kDigits * tiles);
    digit_starts = memory.take<int64_t>(kDigits);
    offsets = memory.take<int64_t>(codes + 1);
    run_sums = memory.take<char>(slots * p.dim * value_bytes(p.z_type));
    bytes = memory.bytes();
  }
};

// Sorts the items by key; they end up in plan.items[0].
void sort_items(const CodeStatisticsProblem& p, Plan& plan, cudaStream_t stream) {
  Source source{plan.items[0], p.indices, p.rows, p.codes, plan.rows, plan.codes};
  for (int shift = 0; shift < 32 && plan.codes >> shift != 0; shift += kDigitBits) {
    launch(count_digits, plan.tiles, kThreads, kDigits * sizeof(int), stream, source, shift, plan.histograms);
    launch(scan_digits, 1, kThreads, kDigits * sizeof(int64_t), stream, plan.tiles, plan.histograms, plan.digit_starts);
    launch(scatter, plan.tiles, kThreads, kWarps * kDigits * (sizeof(int64_t) + sizeof(int)), stream, source, shift,
           plan.histograms, plan.digit_starts, plan.items[1]);
    std::swap(plan.items[0], plan.items[1]);
    source.items = plan.items[0];
    source.indices = nullptr;
  }
}

template <class T, class Z>
void sum(const CodeStatisticsProblem& p, const Plan& plan, void* sums, cudaStream_t stream) {
  const Z* z = static_cast<const Z*>(p.z);
  T* run_sums = static_cast<T*>(plan.run_sums);
  const RowGroup group = RowGroup::of(p.dim, kLog2ColumnThreads);
  launch(sum_runs<T, Z>, group.blocks(plan.slots, kThreads), kThreads, 0, stream, z, plan.items[0], plan.offsets,
         plan.rows, plan.codes, p.dim, group, run_sums);
  launch(sum_codes<T, Z>, group.blocks(plan.codes, kThreads), kThreads, 0, stream, z, plan.items[0], plan.offsets,
         plan.codes, Places{p.codes, p.code_pitch}, p.dim, group, run_sums, static_cast<T*>(sums));
}

}  // namespace

int64_t code_statistics_workspace(const CodeStatisticsProblem& p) { return Plan(p, nullptr).bytes; }

void code_statistics(const CodeStatisticsProblem& p, void* workspace, int64_t* counts, void* sums,
                     cudaStream_t stream) {
  Plan plan(p, workspace);
  if (plan.rows > 0) sort_items(p, plan, stream);
  launch(find_offsets, ceil_div(plan.codes + 1, kThreads), kThreads, 0, stream, plan.items[0].keys, plan.rows,
         plan.codes, Places{p.codes, p.code_pitch}, plan.offsets, counts);
  switch (p.z_type) {
    case DType::float64:
      return sum<double, double>(p, plan, sums, stream);
    case DType::bfloat16:
      return sum<float, BFloat16>(p, plan, sums, stream);
    case DType::float16:
      return sum<float, Half>(p, plan, sums, stream);
    default:
      return sum<float, float>(p, plan, sums, stream);
  }
}

}  // namespace vqkernels::cuda
