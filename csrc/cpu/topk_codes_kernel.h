// The vector kernel of topk_codes.h, written once for every instruction set. Lanes run along rows and codes are swept
// as in nearest_code_kernel.h; a lane is looked at only where a code exceeds the worst of its row's best so far.
#pragma once

#include "nearest_code_kernel.h"
#include "topk_codes.h"
#include "topk_heap.h"

namespace vqkernels::cpu {
namespace {

template <class Simd>
struct TopkSearch : Search<Simd> {
  using Base = Search<Simd>;
  using T = typename Base::T;
  using V = typename Base::V;
  using Base::kCodes;
  using Base::kInf;
  using Base::kMaxNorm;
  using Base::kTileRows;
  using Base::L;

  // Results of the rows of a tile.
  struct Best {
    T* worst;  // [row_vectors, L]; Inf keeps a lane out
    T* scores;
    int64_t* indices;
    int64_t k;
    TopkHeap<T> of(int64_t row) const { return {scores + row * k, indices + row * k, k}; }
  };

  // Sweeps codes, the first of which is `first_code`, over one tile of rows.
  template <int RV>
  __attribute__((noinline)) static void sweep(const typename Base::Sweep& s, int64_t first_code, const T* tile,
                                              const Best& best) {
    for (int64_t k = 0; k < s.count; k += kCodes) {
      V acc[RV][kCodes];
      for (int c = 0; c < kCodes; ++c) {
        for (int r = 0; r < RV; ++r) acc[r][c] = Simd::broadcast(s.bias[k + c]);
      }
      const T* codes = s.codes + k * s.dim;
      for (int64_t d = 0; d < s.dim; ++d) {
        V z[RV];
        for (int r = 0; r < RV; ++r) z[r] = Simd::load(tile + (d * RV + r) * L);
#pragma GCC unroll 6
        for (int c = 0; c < kCodes; ++c) {
          const V value = Simd::broadcast(codes[c * s.dim + d]);
          for (int r = 0; r < RV; ++r) acc[r][c] = Simd::fma(z[r], value, acc[r][c]);
        }
      }
      for (int r = 0; r < RV; ++r) {
        const V worst = Simd::load(best.worst + r * L);
        V top = worst;
        for (int c = 0; c < kCodes; ++c) top = Simd::max(acc[r][c], top);
        if (Simd::any(Simd::greater(top, worst))) take(acc[r], r * L, first_code + k, best);
      }
    }
  }

  __attribute__((noinline)) static void take(const V (&acc)[kCodes], int64_t first_row, int64_t first_code,
                                             const Best& best) {
    T scores[kCodes][L];
    for (int c = 0; c < kCodes; ++c) Simd::store(scores[c], acc[c]);
    for (int i = 0; i < L; ++i) {
      T& worst = best.worst[first_row + i];
      for (int c = 0; c < kCodes; ++c) {
        if (!(scores[c][i] > worst)) continue;
        const TopkHeap<T> heap = best.of(first_row + i);
        heap.replace(scores[c][i], first_code + c);
        worst = heap.worst();
      }
    }
  }

  static void sweep_tile(int64_t row_vectors, const typename Base::Sweep& s, int64_t first_code, const T* tile,
                         const Best& best) {
    switch (row_vectors) {
      case 1:
        return sweep<1>(s, first_code, tile, best);
      case 2:
        return sweep<2>(s, first_code, tile, best);
      case 3:
        return sweep<(Base::kRowVectors < 3 ? Base::kRowVectors : 3)>(s, first_code, tile, best);
      default:
        return sweep<Base::kRowVectors>(s, first_code, tile, best);
    }
  }

  template <class Z, class C>
  static void run(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, int64_t k,
                  T* scores, int64_t* indices) {
    const Z* z = static_cast<const Z*>(p.z) + (b.head * p.rows + b.row_begin) * p.dim;
    const T* codes = prepared ? static_cast<const T*>(prepared->codes) + b.head * p.codes * p.dim : nullptr;
    const T* bias = prepared ? static_cast<const T*>(prepared->bias) + b.head * p.codes : nullptr;
    const C* codebook = static_cast<const C*>(p.codebook) + b.head * p.codes * p.dim;
    typename Base::template Chunks<C> chunks(codebook, codes, bias, b, p.dim, p.metric);
    const int64_t rows = b.row_end - b.row_begin;
    const int64_t padded_rows = (rows + L - 1) / L * L;
    const Buffer<T> tiles(padded_rows * p.dim), worst(padded_rows), norm(padded_rows);
    for (int64_t i = 0; i < rows; ++i) TopkHeap<T>(scores + i * k, indices + i * k, k).clear();
    for (int64_t begin = b.code_begin; begin < b.code_end;) {
      typename Base::Sweep s{};
      s.count = chunks.get(begin, &s.codes, &s.bias);
      s.dim = p.dim;
      for (int64_t first = 0; first < padded_rows; first += kTileRows) {
        T* tile = tiles.get() + first * p.dim;
        const int64_t tile_rows = std::min<int64_t>(kTileRows, padded_rows - first);
        if (begin == b.code_begin) {
          Base::load_tile(z + first * p.dim, rows - first, p.dim, tile_rows / L, tile, &worst[first], &norm[first]);
          for (int64_t i = first; i < first + tile_rows; ++i) {
            if (i >= rows || !(norm[i] <= kMaxNorm)) worst[i] = kInf;
          }
        }
        sweep_tile(tile_rows / L, s, begin, tile, {&worst[first], scores + first * k, indices + first * k, k});
      }
      begin += s.count;
    }
    for (int64_t i = 0; i < rows; ++i) TopkHeap<T>(scores + i * k, indices + i * k, k).sort();
  }
};

template <template <class> class Simd>
void topk_block(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, int64_t k,
                void* scores, int64_t* indices) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    using T = decltype(t);
    TopkSearch<Simd<T>>::template run<decltype(z), decltype(c)>(p, prepared, b, k, static_cast<T*>(scores), indices);
  });
}

}  // namespace
}  // namespace vqkernels::cpu
