// Operands of the kernels, and the table of functions that one instruction set provides.
#pragma once

#include <cstdint>

#include "quant/formats.hpp"

namespace tael {

// Activations in float, [num_tokens, columns padded to 32].
struct FloatRows {
  const float* data;
  int64_t columns;
  int64_t num_tokens;

  const float* row(int64_t token) const { return data + token * columns; }
  FloatRows slice(int64_t first, int64_t count) const { return {row(first), columns, count}; }
};

// Activations in int8, x = scale * value with |value| <= 127 and one scale per group of 32 columns.
// Tokens lie in packs, of equal size but for the last, so that the inner loops of a matmul read one ascending
// stream: of up to six, or of sixteen where the CPU multiplies tiles of so many rows.
//
//     pack    [columns / 32] x { values int8 [tokens][32], QuantizedGroup [tokens] }
constexpr int kMaxPackTokens = 6;

struct QuantizedGroup {
  float scale;
  float scaled_sum;  // scale * (sums[0] + sums[1]), for minimums
  int32_t sums[2];   // of values 0 to 15 and 16 to 31, for zero points
};
constexpr int64_t kGroupBytes = kGroupColumns + sizeof(QuantizedGroup);

constexpr int64_t pack_size(int64_t num_tokens, int wide_pack) {
  if (wide_pack > 0 && num_tokens >= wide_pack) return wide_pack;
  const int64_t packs = (num_tokens + kMaxPackTokens - 1) / kMaxPackTokens;
  return packs == 0 ? 1 : (num_tokens + packs - 1) / packs;
}

struct QuantizedRows {
  uint8_t* data;
  int64_t num_groups;  // columns / 32, rounded up
  int64_t num_tokens;
  int64_t pack_size;

  int64_t num_packs() const { return (num_tokens + pack_size - 1) / pack_size; }
  uint8_t* pack(int64_t i) const { return data + i * pack_size * num_groups * kGroupBytes; }
  int pack_tokens(int64_t i) const {
    const int64_t rest = num_tokens - i * pack_size;
    return int(rest < pack_size ? rest : pack_size);
  }
  QuantizedRows packs(int64_t first, int64_t last) const {
    const int64_t end = last * pack_size < num_tokens ? last * pack_size : num_tokens;
    return {pack(first), num_groups, end - first * pack_size, pack_size};
  }
  // row -= what the int8 form of a token stands for.
  void subtract_from(float* row, int64_t token) const {
    const int64_t tokens = pack_tokens(token / pack_size), place = token % pack_size;
    const uint8_t* group = pack(token / pack_size);
    for (int64_t g = 0; g < num_groups; ++g, row += kGroupColumns, group += tokens * kGroupBytes) {
      const int8_t* values = (const int8_t*)group + place * kGroupColumns;
      const float scale = ((const QuantizedGroup*)(group + tokens * kGroupColumns))[place].scale;
      for (int c = 0; c < kGroupColumns; ++c) row[c] -= scale * float(values[c]);
    }
  }
};

constexpr int kBlockTokens = 32;
constexpr int kMaxHeadDim = 512;

// KV of one layer in one block that is being filled, or of format BF16: per KV head first K, then V,
// each kBlockTokens * head_dim bf16.
//
//     K  [kBlockTokens / 16][head_dim / 2][16 tokens][2]    a vector is 16 tokens x 2 channels
//     V  [kBlockTokens / 2][head_dim][2]                    a vector is 16 channels x 2 tokens
//
// Both are operands of a 2-way bf16 dot product (vdpbf16ps): scores of 16 tokens, or 16 channels
// of the output, without a horizontal sum.
//
// A complete block may be compressed. Its values keep their order; scales and minimums are bf16.
//
//     Q8     K int8, scales [head_dim]; V int8, scales [kBlockTokens]
//     K8V4   K as in Q8; V [pair of tokens][head_dim / 16][16 bytes], of which byte i holds values i
//            (low nibble) and 16 + i of 32 that follow one another, value = scale * nibble + minimum;
//            scales [kBlockTokens], minimums [kBlockTokens]
//
// Keys have a scale per channel, since a few channels of the keys are much larger than the others
// (KIVI, arXiv:2402.02750); values have one per token.
enum class KVFormat : int { BF16, Q8, K8V4 };
constexpr int kNumKVFormats = 3;
inline constexpr const char* kKVFormatNames[kNumKVFormats] = {"bf16", "q8", "k8v4"};

// Places in the bf16 layout, from the start of K and of V.
constexpr int64_t key_place(int head_dim, int token, int channel) {
  return int64_t(token / 16) * head_dim * 16 + channel / 2 * 32 + token % 16 * 2 + channel % 2;
}
constexpr int64_t value_place(int head_dim, int token, int channel) {
  return int64_t(token / 2) * head_dim * 2 + channel * 2 + token % 2;
}

constexpr int64_t bf16_head_bytes(int head_dim) { return 4 * int64_t(kBlockTokens) * head_dim; }
constexpr int64_t q8_key_bytes(int head_dim) { return (kBlockTokens + 2) * int64_t(head_dim); }

// Bytes of one KV head in a complete block.
constexpr int64_t kv_head_bytes(KVFormat format, int head_dim) {
  if (format == KVFormat::BF16) return bf16_head_bytes(head_dim);
  if (format == KVFormat::Q8) return q8_key_bytes(head_dim) + kBlockTokens * (int64_t(head_dim) + 2);
  return q8_key_bytes(head_dim) + kBlockTokens * (int64_t(head_dim) / 2 + 4);
}

// One layer's part of the blocks of a pool.
struct KVPool {
  uint8_t* data;         // first block
  int64_t block_bytes;   // between blocks
  int64_t layer_offset;  // of this layer in a block
  int64_t head_bytes;

  uint8_t* head(int32_t block, int kv_head) const {
    return data + block * block_bytes + layer_offset + kv_head * head_bytes;
  }
};

// Queries of one sequence and one KV head: all query heads of the group for consecutive tokens of
// one block. Row r is token r / num_heads, head r % num_heads. They see the blocks before theirs in
// their format, and their own in bf16.
struct AttentionTask {
  const KVPool* complete;
  KVFormat format;              // of the complete blocks
  const int32_t* block_table;
  const uint16_t* open;         // K, then V, of the block that the tokens are in
  uint16_t* unpacked;           // room for a chunk of blocks in bf16, unless that is their format
  int kv_head;
  int num_heads;                // query heads that share the KV head
  int head_dim;                 // a multiple of 16
  int num_tokens;
  int first_position;           // of the first token
  int window;                   // positions a query sees, itself included; INT32_MAX for all
  const uint16_t* q;            // bf16 [num_rows, head_dim], scaled to give scores in units of log 2

  int num_rows() const { return num_tokens * num_heads; }
  const uint16_t* query(int row) const { return q + int64_t(row) * head_dim; }
  int position(int row) const { return first_position + row / num_heads; }
};

// Attention is accumulated over partitions of this many positions, which are then merged in ascending
// order. So it rounds alike whether one thread walks all of them or several share them.
constexpr int kPartitionTokens = 512;

// And within a partition over chunks of four blocks.
constexpr int kChunkBlocks = 4;
constexpr int kChunkTokens = kChunkBlocks * kBlockTokens;

// Running softmax of one row: maximum, sum of exponentials, weighted sum of values [head_dim].
constexpr int64_t attention_state_floats(int head_dim) { return head_dim + 16; }

enum class Activation : int { SiLU, GeluTanh };

// A token that may be among the most likely.
struct Candidate {
  float logit;
  int32_t token_id;
};

struct Kernels {
  const char* name;
  int wide_pack;  // tokens of a pack where there are at least so many; 0: packs stay narrow
  // Columns 32 * first_group onward of one token, from x[0].
  void (*quantize)(const float* x, int64_t first_group, int64_t num_groups, const QuantizedRows& rows,
                   int64_t token);
  // One of the two is null: float formats take float activations, the others int8.
  void (*matmul[kNumFormats])(const uint8_t* tiles, int64_t tile_stride, int64_t first_tile, int64_t last_tile,
                              const QuantizedRows& x, float* out, int64_t out_stride);
  void (*matmul_float[kNumFormats])(const uint8_t* tiles, int64_t tile_stride, int64_t first_tile,
                                    int64_t last_tile, const FloatRows& x, float* out, int64_t out_stride);
  // Columns are padded to 32 with zeros; `columns` is the divisor of the mean.
  void (*rms_norm)(const float* x, const float* weight, int64_t columns, float eps, float* out);
  void (*add)(float* x, const float* y, int64_t columns);
  // x += rms_norm(y)
  void (*add_normed)(float* x, const float* y, const float* weight, int64_t columns, float eps);
  void (*rope)(float* head, const float* cos, const float* sin, int num_pairs);
  void (*gated_activation)(Activation kind, const float* gate, const float* up, int64_t columns,
                           float* out);
  // State of each row over the positions of one partition.
  void (*attention_partition)(const AttentionTask& task, int partition, float* states);
  // total = total merged with next.
  void (*attention_merge)(float* total, const float* next, int num_rows, int head_dim);
  // For each of num_blocks entries of the task's block table, what its queries can be expected to score: by the bounds of its
  // keys, and by their codes.
  void (*score_bounds)(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes, int num_blocks,
                       float* scores);
  void (*score_codes)(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes, int num_blocks,
                       float* scores);
  // out[head_dim] = values / sum, of one row.
  void (*attention_finish)(const float* state, int head_dim, float* out);
  // Of logits, in vectors of 16: the largest; the sum of exp(factor * (x - maximum)), maximum finite;
  // sums *= exp(factor * (maxima - maximum)). A NaN in x makes the sum NaN.
  float (*largest)(const float* x, int64_t count);
  float (*sum_exp)(const float* x, int64_t count, float maximum, float factor);
  void (*rescale_sums)(float* sums, const float* maxima, int64_t count, float maximum, float factor);
  // Appends the logits that are at least `limit` to out; x[0] is that of first_id. Returns their number.
  int64_t (*select_at_least)(const float* x, int64_t count, float limit, int32_t first_id, Candidate* out);
  // out = x * factor
  void (*to_bf16)(const float* x, float factor, int64_t columns, uint16_t* out);
};

}  // namespace tael
