// Operands of the kernels, and the table of functions that one instruction set provides.
#pragma once

#include <cstdint>

#include "quant/formats.hpp"

namespace tael {

// Activations in float, [tokens, columns padded to 32].
struct FloatRows {
  const float* data;
  int64_t stride;
  const float* values(int64_t token) const { return data + token * stride; }
};

// Activations in int8 with one scale per 32 columns, and their sums per 16 columns (for zero
// points and minimums). x = scale * value, |value| <= 127.
struct QuantizedRows {
  const int8_t* data;
  const float* scale;
  const int32_t* sum;
  int64_t columns;  // padded to 32
  const int8_t* values(int64_t token) const { return data + token * columns; }
  const float* scales(int64_t token) const { return scale + token * (columns / 32); }
  const int32_t* sums(int64_t token) const { return sum + token * (columns / 16); }
};

constexpr int kBlockTokens = 32;

// KV of one layer in one block: per KV head first K, then V, each kBlockTokens * head_dim bf16.
//
//     K  [kBlockTokens / 16][head_dim / 2][16 tokens][2]    a vector is 16 tokens x 2 channels
//     V  [kBlockTokens / 2][head_dim][2]                    a vector is 16 channels x 2 tokens
//
// Both are operands of a 2-way bf16 dot product (vdpbf16ps): scores of 16 tokens, or 16 channels
// of the output, without a horizontal sum.
struct KVLayout {
  uint8_t* pool;         // first block of the pool
  int64_t block_bytes;   // between blocks
  int64_t layer_offset;  // of this layer in a block
  int num_kv_heads;
  int head_dim;          // a multiple of 16

  int64_t head_elements() const { return int64_t(kBlockTokens) * head_dim; }
  uint16_t* keys(int32_t block, int head) const {
    return (uint16_t*)(pool + block * block_bytes + layer_offset) + head * 2 * head_elements();
  }
  uint16_t* values(int32_t block, int head) const { return keys(block, head) + head_elements(); }
};

// Queries of one sequence and one KV head: all query heads of the group for consecutive tokens.
// Row r is token r / num_heads, head r % num_heads.
struct AttentionTask {
  const KVLayout* kv;
  const int32_t* block_table;
  int kv_head;
  int num_heads;       // query heads that share the KV head
  int num_tokens;
  int first_position;  // of the first token
  int window;          // positions a query sees, itself included; INT32_MAX for all
  const float* q;      // [token, head, head_dim], scaled; at the first token and head
  int64_t q_stride;    // between tokens

  int num_rows() const { return num_tokens * num_heads; }
  const float* query(int row) const {
    return q + row / num_heads * q_stride + int64_t(row % num_heads) * kv->head_dim;
  }
  int position(int row) const { return first_position + row / num_heads; }
};

// Attention is accumulated over partitions of this many positions, each block by block; the
// partitions are then merged in ascending order. So it rounds alike whether one thread walks all
// of them or several share them.
constexpr int kPartitionTokens = 512;

// Running softmax of one row: maximum, sum of exponentials, weighted sum of values [head_dim].
constexpr int64_t attention_state_floats(int head_dim) { return head_dim + 16; }

enum class Activation : int { SiLU, GeluTanh };

struct Kernels {
  const char* name;
  void (*quantize)(const float* x, int64_t columns, int8_t* values, float* scales, int32_t* sums);
  // One of the two is null: float formats take float activations, the others int8.
  void (*matmul[kNumFormats])(const uint8_t* tiles, int64_t tile_stride, int64_t num_groups,
                              int64_t first_tile, int64_t last_tile, const QuantizedRows& x,
                              int64_t num_tokens, float* out, int64_t out_stride);
  void (*matmul_float[kNumFormats])(const uint8_t* tiles, int64_t tile_stride, int64_t num_groups,
                                    int64_t first_tile, int64_t last_tile, const FloatRows& x,
                                    int64_t num_tokens, float* out, int64_t out_stride);
  // Columns are padded to 32 with zeros; `columns` is the divisor of the mean.
  void (*rms_norm)(const float* x, const float* weight, int64_t columns, float eps, float* out);
  void (*add)(float* x, const float* y, int64_t columns);
  void (*rope)(float* head, const float* cos, const float* sin, int num_pairs);
  void (*gated_activation)(Activation kind, const float* gate, const float* up, int64_t columns,
                           float* out);
  // State of each row over the positions of one partition.
  void (*attention_partition)(const AttentionTask& task, int partition, float* states);
  // total = total merged with next.
  void (*attention_merge)(float* total, const float* next, int num_rows, int head_dim);
  // out[row] = values / sum, at the place of query(row).
  void (*attention_finish)(const AttentionTask& task, const float* states, float* out);
};

}  // namespace tael
