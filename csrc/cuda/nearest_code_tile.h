// The search of a block: a tile of rows is scored against one tile of codes after the other. Slices of both tiles lie
// in shared memory, transposed and double-buffered, or the rows lie there as a whole; a thread holds the chains of 8 x
// 8 pairs (float) in registers and, between tiles of codes, nothing: what is best so far lies in shared memory. Threads
// that share rows compare at the end. Codes always come in ascending order, so that a strict comparison settles ties.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fixed_order.h"
#include "launch.h"
#include "prepare_codes.h"

namespace vqkernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlice = 8;  // columns in shared memory at a time

// 16 bytes, the widest access.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T x[size];
};

// Tiles of a block whose warps stand WarpRows high. A warp's threads stand 4 rows high and 8 codes wide; each has
// RowVectors vectors of rows and two of codes, a warp's width apart, which keeps shared loads free of bank conflicts.
// ResidentRows: the caller keeps the rows in shared memory, [dim, row_pitch], with zeros behind the
// last column up to half a slice; a tile then only brings the codes. Signs of zero scores may then differ.
template <class T, int WarpRows, int RowVectors, bool ResidentRows = false>
struct Tile {
  static constexpr bool resident_rows = ResidentRows;
  static constexpr int vector = Vector<T>::size;
  static constexpr int row_vectors = RowVectors;
  static constexpr int thread_rows = RowVectors * vector;
  static constexpr int thread_codes = 2 * vector;
  static constexpr int warp_columns = kWarps / WarpRows;
  static constexpr int rows = WarpRows * 4 * thread_rows;
  static constexpr int codes = warp_columns * 8 * thread_codes;
  static constexpr int row_pitch = rows + vector;
  static constexpr int code_pitch = codes + vector;
  static constexpr int row_slice = resident_rows ? 0 : kSlice * row_pitch;  // behind it in a buffer: the codes
  static constexpr int buffer = row_slice + kSlice * code_pitch;
  static constexpr int shared_bytes =
      2 * buffer * static_cast<int>(sizeof(T)) + thread_rows * kThreads * static_cast<int>(sizeof(T) + sizeof(int));
};

// A thread's part in bringing slices into shared memory: one vector of a line (row or code) at a time. It loads into
// registers first, so that a load is under way while the slice before is worked on. Lines behind the last one repeat
// it: their scores are not looked at, or NaN by their bias. Columns behind the last one are padding whose products are
// -0, the one number that leaves every sum as it is.
template <class T, class Tile>
struct Loader {
  static constexpr int kSize = Vector<T>::size;
  static constexpr int kVectors = kSlice / kSize;  // of a line
  static constexpr int kLinesPerWarp = kWarpSize / kVectors;
  static constexpr int kLines = kThreads / kVectors;  // of the block at a time
  static constexpr int kCodeLines = Tile::codes / kLines;

  const T* codebook;
  int codes;
  int dim;
  bool vectors;  // rows and codes begin at multiples of 16 bytes
  int left;      // columns from this thread's next one on
  const T* row_at;
  const T* code_at[kCodeLines];
  Vector<T> row;
  Vector<T> code[kCodeLines];

  static __device__ int line() { return threadIdx.x / kWarpSize * kLinesPerWarp + threadIdx.x % kLinesPerWarp; }
  static __device__ int column() { return threadIdx.x % kWarpSize / kLinesPerWarp * kSize; }

  __device__ Loader(const T* z, int64_t rows, const T* codebook_, int codes_, int dim_, bool vectors_)
      : codebook(codebook_), codes(codes_), dim(dim_), vectors(vectors_), left(dim_ - column()) {
    static_assert(Tile::rows <= kLines, "a thread brings at most one vector of rows");
    if constexpr (!Tile::resident_rows) row_at = z + (line() < rows ? line() : rows - 1) * dim + column();
    begin_codes(0);
  }

  __device__ void begin_codes(int tile) {
#pragma unroll
    for (int n = 0; n < kCodeLines; ++n) {
      const int k = tile * Tile::codes + n * kLines + line();
      code_at[n] = codebook + int64_t{k < codes ? k : codes - 1} * dim + column();
    }
  }

  __device__ void next_tile(int tile) {
    const int done = dim - column() - left;
    if constexpr (!Tile::resident_rows) row_at -= done;
    left += done;
    begin_codes(tile);
  }

  __device__ void next_slice() {
    left -= kSlice;
    if constexpr (!Tile::resident_rows) row_at += kSlice;
#pragma unroll
    for (int n = 0; n < kCodeLines; ++n) code_at[n] += kSlice;
  }

  __device__ void load() {
    if constexpr (!Tile::resident_rows) {
      load(row_at, T(-0.0), Tile::rows == kLines || line() < Tile::rows, &row);
    }
#pragma unroll
    for (int n = 0; n < kCodeLines; ++n) load(code_at[n], T(0.0), true, &code[n]);
  }

  __device__ void load(const T* x, T padding, bool wanted, Vector<T>* v) const {
    if (vectors && wanted && left > 0) {
      *v = *reinterpret_cast<const Vector<T>*>(x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) v->x[i] = wanted && i < left ? x[i] : padding;
  }

  __device__ void store(T* buffer) const {
    if constexpr (!Tile::resident_rows) {
      if (Tile::rows == kLines || line() < Tile::rows) {
        store(row, buffer + column() * Tile::row_pitch + line(), Tile::row_pitch);
      }
    }
    T* code_columns = buffer + Tile::row_slice;
#pragma unroll
    for (int n = 0; n < kCodeLines; ++n) {
      store(code[n], code_columns + column() * Tile::code_pitch + n * kLines + line(), Tile::code_pitch);
    }
  }

  static __device__ void store(const Vector<T>& v, T* shared, int pitch) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) shared[i * pitch] = v.x[i];
  }
};

// Adds Columns columns of the slice to a thread's chains.
template <class Tile, int Columns, class T>
__device__ inline void multiply(const T* rows, const T* codes, T (&chains)[Tile::thread_rows][Tile::thread_codes]) {
  // Kernels with resident rows have more to remember: unrolled further, they spill in this loop (sm_90a).
  constexpr int kUnroll = Tile::resident_rows ? 2 : 2 * Vector<T>::size;
#pragma unroll kUnroll
  for (int d = 0; d < Columns; ++d) {
    Vector<T> r[Tile::row_vectors], c[2];
#pragma unroll
    for (int n = 0; n < Tile::row_vectors; ++n) {
      r[n] = *reinterpret_cast<const Vector<T>*>(rows + d * Tile::row_pitch + n * 4 * Tile::vector);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      c[n] = *reinterpret_cast<const Vector<T>*>(codes + d * Tile::code_pitch + n * 8 * Tile::vector);
    }
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::thread_codes; ++j) {
        chains[i][j] =
            fused(r[i / Tile::vector].x[i % Tile::vector], c[j / Tile::vector].x[j % Tile::vector], chains[i][j]);
      }
    }
  }
}

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

template <class T>
struct Best {
  T score;
  int code;  // -1: none
};

// Searches the codes of the loader for its rows, or for the resident ones, with the first Tile::shared_bytes of shared
// memory. bias: of these codes, NaN for invalid ones and up to the end of the last tile. Thread i < Tile::rows gets
// what is best for row i. All threads call it; between two calls, or before memory is used again, stands a barrier.
template <class Tile, class T>
__device__ __forceinline__ Best<T> search_tile(Loader<T, Tile>& loader, const T* resident, const T* bias) {
  constexpr int kThreadRows = Tile::thread_rows, kThreadCodes = Tile::thread_codes;
  const int slices = static_cast<int>(ceil_div(loader.dim, kSlice));
  const int tiles = static_cast<int>(ceil_div(loader.codes, Tile::codes));
  const bool half_slice = loader.dim - (slices - 1) * kSlice <= kSlice / 2;

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = warp / Tile::warp_columns, warp_column = warp % Tile::warp_columns;
  const int row_offset = warp_row * 4 * kThreadRows + lane / 8 * Tile::vector;
  const int code_offset = warp_column * 8 * kThreadCodes + lane % 8 * Tile::vector;
  const auto row_of = [&](int i) { return row_offset + i / Tile::vector * 4 * Tile::vector + i % Tile::vector; };
  const auto code_of = [&](int j) { return code_offset + j / Tile::vector * 8 * Tile::vector + j % Tile::vector; };

  // Two buffers of [kSlice, row_pitch] rows, unless they are resident, and [kSlice, code_pitch] codes, then what a
  // thread needs only once a tile: the best score and code of its rows, both [thread_rows, threads].
  T* shared = reinterpret_cast<T*>(vqkernels_shared);
  T* best_scores = shared + 2 * Tile::buffer + threadIdx.x;
  int* best_codes = reinterpret_cast<int*>(shared + 2 * Tile::buffer + kThreadRows * kThreads) + threadIdx.x;
  for (int i = 0; i < kThreadRows; ++i) {
    best_scores[i * kThreads] = -kInf<T>;
    best_codes[i * kThreads] = -1;
  }

  loader.load();
  loader.store(shared);
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
      const T* rows =
          (Tile::resident_rows ? resident + (slice - 1) * kSlice * Tile::row_pitch : shared + buffer) + row_offset;
      const T* columns = shared + buffer + Tile::row_slice + code_offset;
      if (slice == slices && half_slice) {
        multiply<Tile, kSlice / 2>(rows, columns, chains);
      } else {
        multiply<Tile, kSlice>(rows, columns, chains);
      }
      buffer = Tile::buffer - buffer;
      if (more) loader.store(shared + buffer);
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

  T* warp_best = shared;  // [warp_columns, rows]
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
  Best<T> best{-kInf<T>, -1};
  if (row >= Tile::rows) return best;
  best = {warp_best[row], warp_code[row]};
  for (int column = 1; column < Tile::warp_columns; ++column) {
    take_better(warp_best[column * Tile::rows + row], warp_code[column * Tile::rows + row], &best.score, &best.code);
  }
  return best;
}

}  // namespace vqkernels::cuda
