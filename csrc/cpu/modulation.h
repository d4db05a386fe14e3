// What the kernels of the norm chain share: rows of a tensor [batch, length, dim], and the sums over rows that are the
// gradients of modulations (shift, scale, gate) and of affine parameters.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../types.h"

namespace vqkernels::cpu {

// A tensor [batch, length, dim] or one that broadcasts to it (stride 0), its last dimension dense. Strides in elements.
struct RowsView {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::float32;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
};

// A dense tensor [batch, length, dim] to write.
struct RowsOut {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::float32;
};

// Over what a gradient is summed: nothing is wanted, or its shape is [dim], [batch, dim] or [batch, length, dim].
enum class Layout { none, of_all, of_batch, of_row };

struct GradientOut {
  void* data = nullptr;
  DType dtype = DType::float32;
  Layout layout = Layout::none;
};

// Rows are added up in runs, the runs of a chunk and then the chunks in double. What a chunk is depends on the shape
// alone, so that the sums do not depend on the number of threads.
inline constexpr int64_t kRunRows = 16;
inline constexpr int64_t kLeastChunkRows = 32;
inline constexpr int64_t kChunksOfItem = 64;
inline constexpr int64_t kChunksOfShortItems = 256;

// A chunk is a part of one batch item, or whole batch items where those are short.
struct Chunks {
  Chunks(int64_t batch, int64_t length) : batch(batch), length(length) {
    if (batch == 0 || length == 0) return;
    if (length > kLeastChunkRows) {
      chunks_of_item = std::min((length + kLeastChunkRows - 1) / kLeastChunkRows, kChunksOfItem);
      rows_of_chunk = (length + chunks_of_item - 1) / chunks_of_item;
      chunks_of_item = (length + rows_of_chunk - 1) / rows_of_chunk;
      count = batch * chunks_of_item;
    } else {
      chunks_of_item = 1;
      rows_of_chunk = length;
      items_of_chunk =
          std::max((kLeastChunkRows + length - 1) / length, (batch + kChunksOfShortItems - 1) / kChunksOfShortItems);
      count = (batch + items_of_chunk - 1) / items_of_chunk;
    }
  }

  int64_t batch;
  int64_t length;
  int64_t chunks_of_item = 0;
  int64_t rows_of_chunk = 0;
  int64_t items_of_chunk = 1;
  int64_t count = 0;
};

}  // namespace vqkernels::cpu
