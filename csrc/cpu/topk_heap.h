// The k best of a row's codes so far, in the memory of its results: a binary heap, the worst on top.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace vqkernels::cpu {
namespace {

template <class T>
class TopkHeap {
 public:
  TopkHeap(T* scores, int64_t* indices, int64_t k) : scores_(scores), indices_(indices), size_(k) {}

  void clear() const {
    std::fill_n(scores_, size_, -std::numeric_limits<T>::infinity());
    std::fill_n(indices_, size_, int64_t{-1});
  }

  // What a code has to exceed to belong to the best.
  T worst() const { return scores_[0]; }

  // Takes a code that exceeds the worst in its place. Codes come in ascending order.
  void replace(T score, int64_t index) const { sink(score, index, size_); }

  // Puts the codes in the order of the results.
  void sort() const {
    for (int64_t end = size_ - 1; end > 0; --end) {
      const T score = scores_[end];
      const int64_t index = indices_[end];
      scores_[end] = scores_[0];
      indices_[end] = indices_[0];
      sink(score, index, end);
    }
  }

 private:
  static bool is_worse(T score, int64_t index, T other_score, int64_t other_index) {
    return score < other_score || (score == other_score && index > other_index);
  }

  // Puts an entry where the top of the first `size` entries was.
  void sink(T score, int64_t index, int64_t size) const {
    int64_t at = 0;
    for (int64_t child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && is_worse(scores_[child + 1], indices_[child + 1], scores_[child], indices_[child])) {
        ++child;
      }
      if (!is_worse(scores_[child], indices_[child], score, index)) break;
      scores_[at] = scores_[child];
      indices_[at] = indices_[child];
      at = child;
    }
    scores_[at] = score;
    indices_[at] = index;
  }

  T* const scores_;
  int64_t* const indices_;
  const int64_t size_;
};

}  // namespace
}  // namespace vqkernels::cpu
