// The tiles of the search: their shape, their way into shared memory, and the multiplication.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fixed_order.h"
#include "launch.h"

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
template <class T, int WarpRows, int RowVectors>
struct Tile {
  static constexpr int vector = Vector<T>::size;
  static constexpr int row_vectors = RowVectors;
  static constexpr int thread_rows = RowVectors * vector;
  static constexpr int thread_codes = 2 * vector;
  static constexpr int warp_columns = kWarps / WarpRows;
  static constexpr int rows = WarpRows * 4 * thread_rows;
  static constexpr int codes = warp_columns * 8 * thread_codes;
  static constexpr int row_pitch = rows + vector;
  static constexpr int code_pitch = codes + vector;
  static constexpr int buffer = kSlice * (row_pitch + code_pitch);
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
  bool vectors;
  int left;  // columns from this thread's next one on
  const T* row_at;
  const T* code_at[kCodeLines];
  Vector<T> row;
  Vector<T> code[kCodeLines];

  static __device__ int line() { return threadIdx.x / kWarpSize * kLinesPerWarp + threadIdx.x % kLinesPerWarp; }
  static __device__ int column() { return threadIdx.x % kWarpSize / kLinesPerWarp * kSize; }

  __device__ Loader(const T* z, int64_t rows, const T* codebook_, int codes_, int dim_, bool vectors_)
      : codebook(codebook_), codes(codes_), dim(dim_), vectors(vectors_), left(dim_ - column()) {
    static_assert(Tile::rows <= kLines, "a thread brings at most one vector of rows");
    row_at = z + (line() < rows ? line() : rows - 1) * dim + column();
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
    row_at -= done;
    left += done;
    begin_codes(tile);
  }

  __device__ void next_slice() {
    left -= kSlice;
    row_at += kSlice;
#pragma unroll
    for (int n = 0; n < kCodeLines; ++n) code_at[n] += kSlice;
  }

  __device__ void load() {
    load(row_at, T(-0.0), Tile::rows == kLines || line() < Tile::rows, &row);
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

  __device__ void store(T* rows, T* code_columns) const {
    if (Tile::rows == kLines || line() < Tile::rows) {
      store(row, rows + column() * Tile::row_pitch + line(), Tile::row_pitch);
    }
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
  constexpr int kUnroll = 2 * Vector<T>::size;
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

}  // namespace vqkernels::cuda
