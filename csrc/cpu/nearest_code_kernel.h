// The vector kernel of the search (contract: nearest_code.h), written once for every instruction set.
//
// Many rows: lanes run along rows. A tile of row vectors stays in the L1 cache, transposed, while code values are
// broadcast from the codebook as it lies in memory; every lane holds one (row, code) chain, and because codes come
// in ascending order a strict comparison settles ties. A group of codes is first reduced with max alone: whether any
// lane improved, and which code did it, is looked at only then, which seldom happens once a good code is known.
// Few rows: lanes run along codes, transposed on the way through the cache, so that one row against a large
// codebook costs one pass over it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../float16.h"
#include "buffer.h"
#include "nearest_code.h"
#include "with_types.h"

namespace vqkernels::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kChunkBytes = 256 * 1024;  // codes that a block of rows sweeps while they stay in L2

template <class Simd>
struct Search {
  using T = typename Simd::Scalar;
  using V = typename Simd::Vector;
  using Index = typename Simd::Index;
  static constexpr int L = Simd::lanes;
  static constexpr int kRowVectors = Simd::registers == 32 ? 4 : 2;  // x kCodes accumulators fill the registers
  static constexpr int kCodes = 6;
  static constexpr int kTileRows = kRowVectors * L;
  static constexpr int kFewRows = L / 2;
  // Codes a row of a tile, before which a row improves too often for a branch to foresee it.
  static constexpr int64_t kUnsettled = 12;
  static constexpr int64_t kLeastFetchDim = 32;  // below it the fetching itself would cost
  static constexpr int kGroups = 4;              // code vectors that few rows meet at a time

  static constexpr T kMaxNorm = std::numeric_limits<T>::max() / 4;
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  // x [count, dim] -> out [dim, ld], one lane a row of x; lanes from count on are zero.
  template <class S>
  static void transpose(const S* x, int64_t count, int64_t dim, T* out, int64_t ld) {
    const int64_t whole = count >= L ? dim / L * L : 0;
    for (int64_t d = 0; d < whole; d += L) {
      V v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        v[i] = Simd::load(x + i * dim + d);
        __builtin_prefetch(x + (i + L) * dim + d);  // short rows defeat the hardware's prefetcher
      }
      Simd::transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) Simd::store(out + (d + i) * ld, v[i]);
    }
    for (int64_t d = whole; d < dim; d += L) {
      const int64_t width = std::min<int64_t>(L, dim - d);
      V v[L];
      for (int i = 0; i < L; ++i) v[i] = i < count ? Simd::load(x + i * dim + d, width) : Simd::zero();
      Simd::transpose(v);
      for (int i = 0; i < width; ++i) Simd::store(out + (d + i) * ld, v[i]);
    }
  }

  // q of every lane of x [dim, ld].
  static V squared_norm(const T* x, int64_t ld, int64_t dim) {
    V q = Simd::zero();
    for (int64_t d = 0; d < dim; ++d) {
      const V v = Simd::load(x + d * ld);
      q = Simd::fma(v, v, q);
    }
    return q;
  }

  static T bias_of(T q, Metric metric) {
    if (!(q <= kMaxNorm)) return kNaN;  // poisons the chain of an invalid code: NaN wins no comparison
    return metric == Metric::l2 ? q * T(-0.5) : T(0);
  }

  static T divisor_of(T q, Metric metric) { return metric == Metric::cosine && q > 0 ? std::sqrt(q) : T(1); }

  // Memory that will be read soon, fetched a little with every group of codes.
  struct Ahead {
    const char* at;
    int64_t bytes;
  };

  // Codes [0, count) that the rows of a tile meet, of which `seen` came before.
  struct Sweep {
    const T* codes;
    const T* bias;
    int64_t count;
    int64_t dim;
    int64_t seen;
  };

  // Sweeps codes over one tile of rows: best and index (of this sweep, -1: nothing better) in memory.
  // Kept out of line: inlined, its registers spill.
  template <int RV, bool kFetch>
  __attribute__((noinline)) static void sweep(const Sweep& s, const T* tile, Ahead ahead, T* best, Index* index) {
    const int64_t dim = s.dim;
    const int64_t unsettled = kUnsettled * RV * L - s.seen;
    const char* const ahead_end = ahead.at + ahead.bytes;
    const int64_t ahead_step = ahead.bytes * kCodes / s.count + kLineBytes;
    V b[RV];
    typename Simd::IndexVector found[RV];
    for (int r = 0; r < RV; ++r) {
      b[r] = Simd::load(best + r * L);
      found[r] = Simd::index(-1);
    }
    for (int64_t k = 0; k < s.count; k += kCodes) {
      V acc[RV][kCodes];
      for (int c = 0; c < kCodes; ++c) {
        for (int r = 0; r < RV; ++r) acc[r][c] = Simd::broadcast(s.bias[k + c]);
      }
      const T* low = s.codes + k * dim;
      const T* high = low + 3 * dim;
#pragma GCC unroll 2
      for (int64_t d = 0; d < dim; ++d) {
        V z[RV];
        for (int r = 0; r < RV; ++r) z[r] = Simd::load(tile + (d * RV + r) * L);
#pragma GCC unroll 6
        for (int c = 0; c < kCodes; ++c) {
          const V value = Simd::broadcast(c < 3 ? low[c * dim + d] : high[(c - 3) * dim + d]);
          for (int r = 0; r < RV; ++r) acc[r][c] = Simd::fma(z[r], value, acc[r][c]);
        }
      }
      if constexpr (kFetch) {
        for (const char* end = std::min(ahead.at + ahead_step, ahead_end); ahead.at < end; ahead.at += kLineBytes) {
          __builtin_prefetch(ahead.at, 0, 2);
        }
      }
      if (k >= unsettled) {
        typename Simd::Mask improved[RV];
        for (int r = 0; r < RV; ++r) {
          V top = b[r];
          for (int c = 0; c < kCodes; ++c) top = Simd::max(acc[r][c], top);
          improved[r] = Simd::greater(top, b[r]);
        }
        for (int r = 1; r < RV; ++r) improved[0] = Simd::either(improved[0], improved[r]);
        if (!Simd::any(improved[0])) continue;
      }
      for (int c = 0; c < kCodes; ++c) {
        const auto code = Simd::index(static_cast<Index>(k + c));
        for (int r = 0; r < RV; ++r) {
          const auto better = Simd::greater(acc[r][c], b[r]);
          b[r] = Simd::max(acc[r][c], b[r]);
          found[r] = Simd::index_select(better, code, found[r]);
        }
      }
    }
    for (int r = 0; r < RV; ++r) {
      Simd::store(best + r * L, b[r]);
      Simd::index_store(index + r * L, found[r]);
    }
  }

  template <bool kFetch>
  static void sweep_tile(int64_t row_vectors, const Sweep& s, const T* tile, Ahead ahead, T* best, Index* index) {
    switch (row_vectors) {
      case 1:
        return sweep<1, kFetch>(s, tile, ahead, best, index);
      case 2:
        return sweep<2, kFetch>(s, tile, ahead, best, index);
      case 3:
        return sweep<(kRowVectors < 3 ? kRowVectors : 3), kFetch>(s, tile, ahead, best, index);
      default:
        return sweep<kRowVectors, kFetch>(s, tile, ahead, best, index);
    }
  }

  // The biases of codes [0, count) and, where `copy` is not null, the codes widened and, for cosine, normalised.
  template <class C>
  static void prepare_codes(const C* codes, int64_t count, int64_t dim, Metric metric, T* lanes, T* bias, T* copy) {
    for (int64_t k = 0; k < count; k += L) {
      const int64_t group = std::min<int64_t>(L, count - k);
      transpose(codes + k * dim, group, dim, lanes, L);
      T q[L];
      Simd::store(q, squared_norm(lanes, L, dim));
      for (int64_t i = 0; i < group; ++i) {
        bias[k + i] = bias_of(q[i], metric);
        if (copy == nullptr) continue;
        const T divisor = divisor_of(q[i], metric);
        for (int64_t d = 0; d < dim; ++d)
          copy[(k + i) * dim + d] = static_cast<T>(widen(codes[(k + i) * dim + d])) / divisor;
      }
    }
  }

  // Fills the last, incomplete group of codes with invalid ones.
  static void pad_codes(int64_t count, int64_t dim, T* bias, T* codes) {
    for (int64_t k = count; k % kCodes != 0; ++k) {
      bias[k] = kNaN;
      std::fill_n(codes + k * dim, dim, T(0));
    }
  }

  // Hands out the codes of a block in whole groups, ready to be swept, from prepared codes or straight from the
  // codebook. What needs no work is used where it lies.
  template <class C>
  class Chunks {
   public:
    Chunks(const C* codebook, const T* prepared_codes, const T* prepared_bias, const SearchBlock& b, int64_t dim,
           Metric metric)
        : codebook_(codebook),
          prepared_codes_(prepared_codes),
          prepared_bias_(prepared_bias),
          code_end_(b.code_end),
          dim_(dim),
          metric_(metric),
          in_place_(prepared_codes != nullptr || (std::is_same_v<C, T> && metric != Metric::cosine)),
          chunk_(std::max<int64_t>(
              kCodes, std::min(kChunkBytes / (dim * int64_t{sizeof(T)}), b.code_end - b.code_begin) / kCodes * kCodes)),
          lanes_(L * dim),
          bias_(chunk_),
          copy_((in_place_ ? kCodes : chunk_) * dim) {}

    // The chunk that begins at code `begin`; returns how many codes it holds.
    int64_t get(int64_t begin, const T** codes, const T** bias) {
      const int64_t rest = code_end_ - begin;
      const bool whole = in_place_ && rest >= kCodes;
      const int64_t count = whole ? std::min(chunk_, rest / kCodes * kCodes) : std::min(chunk_, rest);
      *codes = copy_.get();
      *bias = bias_.get();
      if (prepared_codes_ != nullptr) {
        *codes = prepared_codes_ + begin * dim_;
        *bias = prepared_bias_ + begin;
      } else {
        prepare_codes(codebook_ + begin * dim_, count, dim_, metric_, lanes_.get(), bias_.get(),
                      whole ? nullptr : copy_.get());
        if (whole) *codes = reinterpret_cast<const T*>(codebook_ + begin * dim_);
      }
      if (count % kCodes != 0) {
        if (prepared_codes_ != nullptr) {
          std::copy_n(*codes, count * dim_, copy_.get());
          std::copy_n(*bias, count, bias_.get());
          *codes = copy_.get();
          *bias = bias_.get();
        }
        pad_codes(count, dim_, bias_.get(), copy_.get());
      }
      return count;
    }

   private:
    const C* codebook_;
    const T* prepared_codes_;
    const T* prepared_bias_;
    const int64_t code_end_;
    const int64_t dim_;
    const Metric metric_;
    const bool in_place_;
    const int64_t chunk_;
    const Buffer<T> lanes_, bias_, copy_;
  };

  // Transposes the rows of a tile; nothing is best yet.
  template <class Z>
  static void load_tile(const Z* z, int64_t rows, int64_t dim, int64_t vectors, T* tile, T* best, T* norm) {
    for (int64_t v = 0; v < vectors; ++v) {
      transpose(z + v * L * dim, rows - v * L, dim, tile + v * L, vectors * L);
      Simd::store(norm + v * L, squared_norm(tile + v * L, vectors * L, dim));
      Simd::store(best + v * L, Simd::broadcast(-kInf));
    }
  }

  template <class Z, class C>
  static void many_rows(const Z* z, Chunks<C>& chunks, const SearchBlock& b, int64_t dim, T* scores, int64_t* indices) {
    const int64_t rows = b.row_end - b.row_begin;
    const int64_t padded_rows = (rows + L - 1) / L * L;
    const Buffer<T> tiles(padded_rows * dim), best(padded_rows), norm(padded_rows);
    const Buffer<Index> found(padded_rows);
    std::fill_n(indices, rows, -1);
    for (int64_t begin = b.code_begin; begin < b.code_end;) {
      Sweep s{};
      s.count = chunks.get(begin, &s.codes, &s.bias);
      s.dim = dim;
      s.seen = begin - b.code_begin;
      for (int64_t first = 0; first < padded_rows; first += kTileRows) {
        T* tile = tiles.get() + first * dim;
        const int64_t vectors = std::min<int64_t>(kTileRows, padded_rows - first) / L;
        if (s.seen == 0) load_tile(z + first * dim, rows - first, dim, vectors, tile, &best[first], &norm[first]);
        if (s.seen == 0 && dim >= kLeastFetchDim) {
          const int64_t next = std::min(rows, first + kTileRows), next_end = std::min(rows, next + kTileRows);
          const Ahead ahead{reinterpret_cast<const char*>(z + next * dim),
                            (next_end - next) * dim * int64_t{sizeof(Z)}};
          sweep_tile<true>(vectors, s, tile, ahead, &best[first], &found[first]);
        } else {
          sweep_tile<false>(vectors, s, tile, {}, &best[first], &found[first]);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        if (found[i] >= 0) indices[i] = begin + found[i];
      }
      begin += s.count;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_valid = norm[i] <= kMaxNorm;
      scores[i] = is_valid ? best[i] : -kInf;
      if (!is_valid) indices[i] = -1;
    }
  }

  template <class Z, class C>
  static void few_rows(const Z* z, const C* codebook, const SearchBlock& b, int64_t dim, Metric metric, T* scores,
                       int64_t* indices) {
    constexpr int64_t W = kGroups * L;
    const int64_t rows = b.row_end - b.row_begin;
    const Buffer<T> row_values(rows * dim), best(rows * L), lanes(dim * W);
    const Buffer<int64_t> found(rows * L);
    for (int64_t i = 0; i < rows * dim; ++i) row_values[i] = widen(z[i]);
    std::fill_n(best.get(), rows * L, -kInf);
    std::fill_n(found.get(), rows * L, -1);

    for (int64_t k = b.code_begin; k < b.code_end; k += W) {
      T q[W], divisor[W], bias[W];
      for (int g = 0; g < kGroups; ++g) {
        const int64_t first = k + g * L;
        const int64_t count = std::clamp<int64_t>(b.code_end - first, 0, L);
        transpose(codebook + (count > 0 ? first * dim : 0), count, dim, lanes.get() + g * L, W);
        Simd::store(q + g * L, squared_norm(lanes.get() + g * L, W, dim));
        for (int i = 0; i < L; ++i) bias[g * L + i] = i < count ? bias_of(q[g * L + i], metric) : kNaN;
      }
      if (metric == Metric::cosine) {
        for (int64_t i = 0; i < W; ++i) divisor[i] = divisor_of(q[i], metric);
        for (int64_t d = 0; d < dim; ++d) {
          for (int64_t i = 0; i < W; ++i) lanes[d * W + i] /= divisor[i];
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        V acc[kGroups];
        for (int g = 0; g < kGroups; ++g) acc[g] = Simd::load(bias + g * L);
        for (int64_t d = 0; d < dim; ++d) {
          const V value = Simd::broadcast(row_values[r * dim + d]);
          for (int g = 0; g < kGroups; ++g) acc[g] = Simd::fma(value, Simd::load(&lanes[d * W + g * L]), acc[g]);
        }
        const V old = Simd::load(&best[r * L]);
        V top = old;
        for (int g = 0; g < kGroups; ++g) top = Simd::max(acc[g], top);
        if (!Simd::any(Simd::greater(top, old))) continue;
        T s[W];
        for (int g = 0; g < kGroups; ++g) Simd::store(s + g * L, acc[g]);
        for (int i = 0; i < W; ++i) {
          if (s[i] > best[r * L + i % L]) {
            best[r * L + i % L] = s[i];
            found[r * L + i % L] = k + i;
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      scores[r] = -kInf;
      indices[r] = -1;
      T q = 0;
      for (int64_t d = 0; d < dim; ++d) q = std::fma(row_values[r * dim + d], row_values[r * dim + d], q);
      if (!(q <= kMaxNorm)) continue;
      for (int i = 0; i < L; ++i) {
        const T score = best[r * L + i];
        const int64_t code = found[r * L + i];
        if (score > scores[r] || (score == scores[r] && code >= 0 && code < indices[r])) {
          scores[r] = score;
          indices[r] = code;
        }
      }
    }
  }

  template <class C>
  static void prepare(const NearestCodeProblem& p, int64_t head, int64_t code_begin, int64_t code_end, void* codes,
                      void* bias) {
    const Buffer<T> lanes(L * p.dim);
    const C* source = static_cast<const C*>(p.codebook) + (head * p.codes + code_begin) * p.dim;
    T* copy = codes == nullptr ? nullptr : static_cast<T*>(codes) + code_begin * p.dim;
    prepare_codes(source, code_end - code_begin, p.dim, p.metric, lanes.get(), static_cast<T*>(bias) + code_begin,
                  copy);
  }

  template <class Z, class C>
  static void run(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, void* scores,
                  int64_t* indices) {
    const Z* z = static_cast<const Z*>(p.z) + (b.head * p.rows + b.row_begin) * p.dim;
    const C* codebook = static_cast<const C*>(p.codebook) + b.head * p.codes * p.dim;
    if (prepared == nullptr && b.row_end - b.row_begin <= kFewRows) {
      return few_rows(z, codebook, b, p.dim, p.metric, static_cast<T*>(scores), indices);
    }
    const T* codes = prepared ? static_cast<const T*>(prepared->codes) + b.head * p.codes * p.dim : nullptr;
    const T* bias = prepared ? static_cast<const T*>(prepared->bias) + b.head * p.codes : nullptr;
    Chunks<C> chunks(codebook, codes, bias, b, p.dim, p.metric);
    many_rows(z, chunks, b, p.dim, static_cast<T*>(scores), indices);
  }
};

template <template <class> class Simd>
void search_block(const NearestCodeProblem& p, const PreparedCodes* prepared, const SearchBlock& b, void* scores,
                  int64_t* indices) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto z, auto c) {
    Search<Simd<decltype(t)>>::template run<decltype(z), decltype(c)>(p, prepared, b, scores, indices);
  });
}

template <template <class> class Simd>
void prepare_block(const NearestCodeProblem& p, int64_t head, int64_t code_begin, int64_t code_end, void* codes,
                   void* bias) {
  with_types(p.z_type, p.codebook_type, [&](auto t, auto, auto c) {
    Search<Simd<decltype(t)>>::template prepare<decltype(c)>(p, head, code_begin, code_end, codes, bias);
  });
}

}  // namespace
}  // namespace vqkernels::cpu
