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

// Inputs of linear layers: float rows, and the same in int8 where a quantised matrix reads them.
// Columns past the end of a vector stay zero.
class Activations {
 public:
  Activations() = default;
  Activations(int64_t max_tokens, int64_t columns)
      : columns_(padded_columns(columns)),
        values_(max_tokens * columns_),
        quantized_(max_tokens * columns_),
        scales_(max_tokens * columns_ / 32),
        sums_(max_tokens * columns_ / 16) {}

  int64_t columns() const { return columns_; }
  float* row(int64_t token) const { return values_.data() + token * columns_; }
  void quantize(const Kernels& kernels, int64_t token) const {
    kernels.quantize(row(token), columns_, quantized_.data() + token * columns_,
                     scales_.data() + token * (columns_ / 32), sums_.data() + token * (columns_ / 16));
  }
  // rest = row(token) minus what its int8 form stands for.
  void subtract_quantized(int64_t token, float* rest) const {
    const QuantizedRows all = quantized();
    for (int64_t c = 0; c < columns_; ++c)
      rest[c] = row(token)[c] - all.scales(token)[c / 32] * float(all.values(token)[c]);
  }
  FloatRows floats() const { return {values_.data(), columns_}; }
  QuantizedRows quantized() const { return {quantized_.data(), scales_.data(), sums_.data(), columns_}; }
  int64_t bytes() const { return values_.bytes() + quantized_.bytes() + scales_.bytes() + sums_.bytes(); }

 private:
  int64_t columns_ = 0;
  Buffer<float> values_;
  Buffer<int8_t> quantized_;
  Buffer<float> scales_;
  Buffer<int32_t> sums_;
};

struct LinearOp {
  const Matrix* weight;
  float* out;
  int64_t out_stride;  // at least weight->padded_rows()
};

// Tokens whose activations stay in the L2 cache while tiles pass by.
constexpr int64_t kTokenBlock = 128;

// out = x W^T for several matrices that read the same rows. Called by every thread of the pool.
inline void linear(ThreadPool& pool, const Kernels& kernels, const Activations& x, int64_t num_tokens,
                   std::initializer_list<LinearOp> ops) {
  int64_t tiles = 0;
  for (const LinearOp& op : ops) tiles += num_tiles(op.weight->rows);
  const int64_t token_blocks = (num_tokens + kTokenBlock - 1) / kTokenBlock;
  const int64_t per_thread = tiles / (8 * pool.num_threads());
  const int64_t chunk = per_thread < 1 ? 1 : per_thread > 8 ? 8 : per_thread;
  pool.parallel_for(tiles * token_blocks, chunk, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t m = first / tiles * kTokenBlock;
      const int64_t count = num_tokens - m < kTokenBlock ? num_tokens - m : kTokenBlock;
      int64_t tile = first % tiles;
      for (const LinearOp& op : ops) {
        const Matrix& w = *op.weight;
        const int64_t in_matrix = num_tiles(w.rows);
        if (tile >= in_matrix) {
          tile -= in_matrix;
          continue;
        }
        const int64_t end = tile + (last - first) < in_matrix ? tile + (last - first) : in_matrix;
        const int64_t groups = padded_columns(w.columns) / kGroupColumns;
        float* out = op.out + m * op.out_stride;
        if (is_float(w.format)) {
          const FloatRows all = x.floats();
          kernels.matmul_float[int(w.format)](w.tiles, w.tile_stride(), groups, tile, end,
                                              {all.values(m), all.stride}, count, out, op.out_stride);
        } else {
          const QuantizedRows all = x.quantized();
          kernels.matmul[int(w.format)](w.tiles, w.tile_stride(), groups, tile, end,
                                        {all.values(m), all.scales(m), all.sums(m), all.columns}, count,
                                        out, op.out_stride);
        }
        first += end - tile;
        break;
      }
    }
  });
}

}  // namespace tael
