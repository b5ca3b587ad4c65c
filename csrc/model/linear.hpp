// Weight matrices, and the rows that they multiply.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "common/thread_pool.hpp"
#include "kernels/types.hpp"

namespace tael {

// A matrix in tile layout. The bytes belong to the caller.
struct Matrix {
  Format format;
  int64_t rows;
  int64_t columns;
  const uint8_t* tiles;

  int64_t tile_stride() const { return tile_bytes(format, columns); }
  const uint8_t* tile(int64_t index) const { return tiles + index * tile_stride(); }
  // Width of an output row: kernels write whole tiles.
  int64_t padded_rows() const { return padded_columns(rows); }
};

// 64-byte aligned, zeroed memory. Sizes are fixed at load, so a step allocates nothing.
template <class T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    const size_t bytes = (size_t(size) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!data_) throw std::bad_alloc();
    for (int64_t i = 0; i < size; ++i) data_.get()[i] = T{};
  }
  T* data() const { return data_.get(); }
  int64_t bytes() const { return size_ * int64_t(sizeof(T)); }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Float rows, [max_tokens, columns padded to 32]. Columns past the end of a vector stay zero.
class Rows {
 public:
  Rows() = default;
  Rows(int64_t max_tokens, int64_t columns)
      : columns_(padded_columns(columns)), values_(max_tokens * columns_) {}

  int64_t columns() const { return columns_; }
  float* row(int64_t token) const { return values_.data() + token * columns_; }
  FloatRows floats(int64_t num_tokens) const { return {values_.data(), columns_, num_tokens}; }
  int64_t bytes() const { return values_.bytes(); }

 private:
  int64_t columns_ = 0;
  Buffer<float> values_;
};

// Room for int8 rows of up to max_columns columns.
class QuantizedBuffer {
 public:
  QuantizedBuffer() = default;
  QuantizedBuffer(int64_t max_tokens, int64_t max_columns)
      : bytes_(max_tokens * padded_columns(max_columns) / kGroupColumns * kGroupBytes) {}

  QuantizedRows rows(const Kernels& kernels, int64_t num_tokens, int64_t columns) const {
    return packs_of(pack_size(num_tokens, kernels.wide_pack), num_tokens, columns);
  }
  QuantizedRows packs_of(int64_t pack_size, int64_t num_tokens, int64_t columns) const {
    return {bytes_.data(), padded_columns(columns) / kGroupColumns, num_tokens, pack_size};
  }
  int64_t bytes() const { return bytes_.bytes(); }

 private:
  Buffer<uint8_t> bytes_;
};

// What a linear layer reads: the matrices of float formats take the float rows, others the int8.
struct LinearInput {
  FloatRows floats;
  QuantizedRows quantized;
};

// Tokens that pass by one piece of a matrix, in whole packs: their activations stay near, in the L2 cache.
constexpr int64_t kMaxTokenBlock = 288;

inline int64_t packs_of_a_block(const LinearInput& x) { return kMaxTokenBlock / x.quantized.pack_size; }
inline int64_t num_token_blocks(const LinearInput& x) {
  return (x.quantized.num_packs() + packs_of_a_block(x) - 1) / packs_of_a_block(x);
}
inline int64_t block_start(const LinearInput& x, int64_t block) {
  return block * packs_of_a_block(x) * x.quantized.pack_size;
}

// Rows of tiles [first, last) for the tokens of one block; out[0] is row 0 of the first tile for the
// first of the tokens. Returns their number.
inline int64_t multiply_tiles(const Kernels& kernels, const Matrix& w, int64_t first, int64_t last,
                              const LinearInput& x, int64_t block, float* out, int64_t out_stride) {
  const QuantizedRows rows = x.quantized.packs(block * packs_of_a_block(x), (block + 1) * packs_of_a_block(x));
  if (is_float(w.format))
    kernels.matmul_float[int(w.format)](w.tiles, w.tile_stride(), first, last,
                                        x.floats.slice(block_start(x, block), rows.num_tokens), out, out_stride);
  else
    kernels.matmul[int(w.format)](w.tiles, w.tile_stride(), first, last, rows, out, out_stride);
  return rows.num_tokens;
}

// Tiles that a thread takes at a time: even, since kernels take pairs, and about 64 KiB, so that
// taking them costs nothing and the threads end together.
inline int64_t tiles_at_a_time(const Matrix& w) {
  const int64_t pairs = (int64_t(32) << 10) / w.tile_stride();
  return 2 * (pairs < 1 ? 1 : pairs > 8 ? 8 : pairs);
}

struct LinearOp {
  const Matrix* weight;
  float* out;
  int64_t out_stride;  // at least weight->padded_rows()
};

// out = x W^T for several matrices that read the same rows. Called by every thread of the pool.
inline void linear(ThreadPool& pool, int thread, const Kernels& kernels, const LinearInput& x,
                   std::initializer_list<LinearOp> ops) {
  int64_t per_block = 0;  // work items
  const auto num_items = [](const Matrix& w) {
    return (num_tiles(w.rows) + tiles_at_a_time(w) - 1) / tiles_at_a_time(w);
  };
  for (const LinearOp& op : ops) per_block += num_items(*op.weight);
  pool.parallel_for(thread, per_block * num_token_blocks(x), [&](int64_t item) {
    const int64_t block = item / per_block;
    item %= per_block;
    for (const LinearOp& op : ops) {
      const Matrix& w = *op.weight;
      if (item >= num_items(w)) {
        item -= num_items(w);
        continue;
      }
      const int64_t first = item * tiles_at_a_time(w), last = first + tiles_at_a_time(w);
      float* out = op.out + block_start(x, block) * op.out_stride + first * kTileRows;
      multiply_tiles(kernels, w, first, last < num_tiles(w.rows) ? last : num_tiles(w.rows), x, block, out,
                     op.out_stride);
      return;
    }
  });
}

}  // namespace tael
