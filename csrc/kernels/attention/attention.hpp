// Softmax attention over paged KV, the query heads of a group together so that K and V are read
// once. What a row computes depends on its position only: KV is taken in chunks of 128 positions
// that start at multiples of 128, and positions that a row does not see add exact zeros, whichever
// rows share its task (as long as the KV is finite).
//
// Scores are in units of log 2, so that a weight is 2^(score - maximum); queries and weights are
// rounded to bf16, as K and V are, and multiplied in pairs (vdpbf16ps where the CPU has it) or in tiles of 16 by
// 16 (AMX). Compressed blocks become bf16 in registers where one pass over them serves all rows, and else in
// the task's room.
#pragma once

#include <cstring>

#include "kernels/kv_block/unpack.hpp"
#include "kernels/math.hpp"
#include "kernels/types.hpp"
#include "simd/has_tiles.hpp"

namespace tael {

template <class S> struct AttentionKernel {
  using F = typename S::F;
  static constexpr float kNegativeInfinity = -__builtin_inff();

  // State of a row: maximum, sum, then at 16 the weighted sum of values.
  static float* output(float* state) { return state + 16; }
  static const float* output(const float* state) { return state + 16; }

  static void partition(const AttentionTask& task, int index, float* states) {
    const int64_t stride = attention_state_floats(task.head_dim);
    for (int r = 0; r < task.num_rows(); ++r) {
      float* state = states + r * stride;
      for (int64_t i = 0; i < stride; i += 16) S::store(state + i, S::zero());
      state[0] = kNegativeInfinity;
    }
    const int64_t begin = int64_t(index) * kPartitionTokens;
    const int64_t seen = int64_t(task.first_position) - task.window + 1;
    const int64_t end_of_task = int64_t(task.first_position) + task.num_tokens;
    const int64_t first = seen > begin ? seen : begin;
    const int64_t last = begin + kPartitionTokens < end_of_task ? begin + kPartitionTokens : end_of_task;
    if (first >= last) return;
    // Beyond the last position comes the next partition, most likely of this thread too.
    const int64_t last_block = (end_of_task - 1) / kBlockTokens;
    Chunk chunk;
    for (chunk.start = first / kChunkTokens * kChunkTokens; chunk.start < last; chunk.start += kChunkTokens) {
      chunk.first_block = first > chunk.start ? int(first - chunk.start) / kBlockTokens : 0;
      const int64_t rest = last - chunk.start;
      chunk.num_valid = rest < kChunkTokens ? int(rest) : kChunkTokens;
      for (int b = chunk.first_block; b < chunk.num_blocks(); ++b) {
        const int64_t i = chunk.start / kBlockTokens + b;
        find_block(task, i, i + kChunkBlocks < last_block ? i + kChunkBlocks : last_block, b, chunk);
      }
      if constexpr (HasTiles<S>)
        if (fits_tiles(task)) {
          add_tiles(task, chunk, states, stride);
          continue;
        }
      add_rows<S::kAttentionRows>(task, chunk, states, stride, 0);
    }
  }

  static void merge(float* total, const float* next, int num_rows, int head_dim) {
    const int64_t stride = attention_state_floats(head_dim);
    for (int r = 0; r < num_rows; ++r, total += stride, next += stride) {
      if (next[0] == kNegativeInfinity) continue;  // saw nothing
      const float top = total[0] > next[0] ? total[0] : next[0];
      const F a = vector_exp2<S>(S::splat(total[0] - top));
      const F b = vector_exp2<S>(S::splat(next[0] - top));
      total[1] = first_lane(S::fma(S::splat(total[1]), a, S::mul(S::splat(next[1]), b)));
      total[0] = top;
      for (int d = 0; d < head_dim; d += 16)
        S::store(output(total) + d,
                 S::fma(S::load(output(total) + d), a, S::mul(S::load(output(next) + d), b)));
    }
  }

  static void finish(const float* state, int head_dim, float* out) {
    for (int d = 0; d < head_dim; d += 16)
      S::store(out + d, S::div(S::load(output(state) + d), S::splat(state[1])));
  }

 private:
  // Up to 128 positions, of which blocks first_block to num_blocks() - 1 are looked at.
  struct Chunk {
    struct Block {
      KVFormat format;
      const uint8_t* data;
      const uint8_t* next;  // to be fetched meanwhile
    };
    int64_t start;
    int first_block;
    int num_valid;  // positions that hold KV
    Block blocks[kChunkBlocks];
    int num_blocks() const { return (num_valid + kBlockTokens - 1) / kBlockTokens; }
  };

  // Block i of the sequence becomes block b of the chunk; `next` will be needed in its place.
  static void find_block(const AttentionTask& task, int64_t i, int64_t next, int b, Chunk& chunk) {
    const int64_t open = task.first_position / kBlockTokens;
    const auto data = [&](int64_t block) {
      return block == open ? (const uint8_t*)task.open : task.complete->head(task.block_table[block], task.kv_head);
    };
    typename Chunk::Block& block = chunk.blocks[b];
    block = {i == open ? KVFormat::BF16 : task.format, data(i), data(next)};
    if (block.format == KVFormat::BF16) return;
    if (task.num_rows() <= S::kAttentionRows && !fits_tiles(task)) return;
    uint16_t* room = task.unpacked + b * 2 * int64_t(kBlockTokens) * task.head_dim;
    with_block(block, task.head_dim, [&](const auto& packed) { unpack_head<S>(packed, task.head_dim, room); });
    block = {KVFormat::BF16, (const uint8_t*)room, (const uint8_t*)room};
  }

  // Calls fn with what reads the block.
  template <class Fn> static void with_block(const typename Chunk::Block& block, int head_dim, Fn&& fn) {
    if (block.format == KVFormat::BF16)
      fn(PlainBlock<S>{(const uint16_t*)block.data, (const uint16_t*)block.next, head_dim});
    else if (block.format == KVFormat::Q8)
      fn(PackedBlock<S, KVFormat::Q8>{block.data, block.next, head_dim});
    else
      fn(PackedBlock<S, KVFormat::K8V4>{block.data, block.next, head_dim});
  }

  static float first_lane(F a) {
    float lanes[16];
    S::store(lanes, a);
    return lanes[0];
  }

  // Whatever the number of rows, so that each is rounded alike.
  static bool fits_tiles(const AttentionTask& task) { return HasTiles<S> && task.head_dim % 32 == 0; }

  static void add_tiles(const AttentionTask& task, const Chunk& chunk, float* states, int64_t stride) {
    const int64_t size = int64_t(kBlockTokens) * task.head_dim;
    const uint16_t* values[kChunkBlocks];
    for (int b = chunk.first_block; b < chunk.num_blocks(); ++b)
      values[b] = (const uint16_t*)chunk.blocks[b].data + size;
    // A tile takes all values of a block, those of tokens that are not there yet too: these are to be zeros.
    alignas(64) uint16_t last[kBlockTokens * kMaxHeadDim];
    if (const int rest = chunk.num_valid % kBlockTokens) {
      const uint16_t*& open = values[chunk.num_blocks() - 1];
      const int64_t there = int64_t(rest + 1) / 2 * 2 * task.head_dim;
      memcpy(last, open, there * sizeof(uint16_t));
      memset(last + there, 0, (size - there) * sizeof(uint16_t));
      open = last;
    }
    constexpr int most = S::template Tiles<32>::kRows;
    for (int row = 0; row < task.num_rows(); row += most) {
      const int rest = task.num_rows() - row;
      chunk_tiles(task, row, rest < most ? rest : most, chunk, values, states + row * stride, stride);
    }
  }

  static void chunk_tiles(const AttentionTask& task, int first_row, int num_rows, const Chunk& chunk,
                          const uint16_t* const* values, float* states, int64_t stride) {
    constexpr int most = S::template Tiles<32>::kRows;
    alignas(64) float scores[most][kChunkTokens], sums[most][32];
    alignas(64) uint16_t weights[most][kChunkTokens];
    float rescale[most];
    const int head_dim = task.head_dim;
    const int64_t size = int64_t(kBlockTokens) * head_dim;
    const typename S::template Tiles<32> tiles(num_rows);
    // The first rows fetch the block that will be needed in the place of this one.
    const auto next = [&](const typename Chunk::Block& block) {
      return first_row == 0 && block.next != block.data ? (const uint16_t*)block.next : nullptr;
    };
    for (int b = chunk.first_block; b < chunk.num_blocks(); ++b) {
      const typename Chunk::Block& block = chunk.blocks[b];
      const uint16_t *q = task.query(first_row), *keys = (const uint16_t*)block.data, *next_keys = next(block);
      tiles.multiply(
          head_dim / 32,
          [&](int i) {
            return typename S::TileStep{q + 32 * i, keys + 512 * i, next_keys ? next_keys + 512 * i : nullptr};
          },
          head_dim, 32, size / 2, scores[0] + b * kBlockTokens, kChunkTokens);
    }
    bool any = false;
    for (int r = 0; r < num_rows; ++r)
      any |= softmax_row(task, first_row + r, chunk, scores[r], weights[r], states + r * stride, &rescale[r]);
    if (!any) return;
    for (int d = 0; d < head_dim; d += 32) {
      tiles.multiply(
          chunk.num_blocks() - chunk.first_block,
          [&](int i) {
            const int b = chunk.first_block + i;
            const uint16_t* next_values = next(chunk.blocks[b]);
            return typename S::TileStep{weights[0] + b * kBlockTokens, values[b] + 2 * d,
                                        next_values ? next_values + size + 2 * d : nullptr};
          },
          kChunkTokens, 2 * head_dim, 32, sums[0], 32);
      for (int r = 0; r < num_rows; ++r)
        for (int v = 0; v < 32; v += 16) {
          float* out = output(states + r * stride) + d + v;
          S::store(out, S::fma(S::load(out), S::splat(rescale[r]), S::load(sums[r] + v)));
        }
    }
  }

  // All rows from first_row on, R at a time and the rest together.
  template <int R>
  static void add_rows(const AttentionTask& task, const Chunk& chunk, float* states, int64_t stride, int first_row) {
    for (; first_row + R <= task.num_rows(); first_row += R)
      chunk_rows<R>(task, first_row, chunk, states + first_row * stride, stride);
    if constexpr (R > 1)
      if (first_row < task.num_rows()) add_rows<R - 1>(task, chunk, states, stride, first_row);
  }

  template <int R>
  static void chunk_rows(const AttentionTask& task, int first_row, const Chunk& chunk, float* states,
                         int64_t stride) {
    alignas(64) float scores[R][kChunkTokens];
    alignas(64) uint16_t weights[R][kChunkTokens];
    float rescale[R];
    const int head_dim = task.head_dim;
    for (int b = chunk.first_block; b < chunk.num_blocks(); ++b)
      with_block(chunk.blocks[b], head_dim, [&](const auto& block) {
        add_keys<R>(head_dim, task.query(first_row), block, scores[0] + b * kBlockTokens);
      });
    bool any = false;
    for (int r = 0; r < R; ++r)
      any |= softmax_row(task, first_row + r, chunk, scores[r], weights[r], states + r * stride, &rescale[r]);
    if (!any) return;
    int d = 0;
    for (; d + 32 <= head_dim; d += 32) add_values<R, 2>(head_dim, d, chunk, weights[0], rescale, states, stride);
    if (d < head_dim) add_values<R, 1>(head_dim, d, chunk, weights[0], rescale, states, stride);
  }

  // scores[r][position] = q[r] . keys[position], for one block.
  template <int R, class Block>
  static void add_keys(int head_dim, const uint16_t* q, const Block& block, float* scores) {
    F acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = S::zero();
    for (int d = 0; d < head_dim; d += 2) {
      const typename S::B k0 = block.key_pairs(d, 0), k1 = block.key_pairs(d, 1);
      for (int r = 0; r < R; ++r) {
        const typename S::X pair = S::splat_four((const int8_t*)(q + r * head_dim + d));
        acc[r][0] = S::dot_bf16(acc[r][0], k0, pair);
        acc[r][1] = S::dot_bf16(acc[r][1], k1, pair);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) S::store(scores + r * kChunkTokens + 16 * v, acc[r][v]);
  }

  // Turns scores into weights relative to the row's new maximum; `rescale` is for what came
  // before. False, with weights of zero, where the row sees no position of the chunk.
  static bool softmax_row(const AttentionTask& task, int row, const Chunk& chunk, const float* scores,
                          uint16_t* weights, float* state, float* rescale) {
    const int64_t oldest = int64_t(task.position(row)) - task.window + 1 - chunk.start;
    const int64_t newest = int64_t(task.position(row)) + 1 - chunk.start;
    const int first = oldest > 0 ? int(oldest < kChunkTokens ? oldest : kChunkTokens) : 0;
    const int last = newest < chunk.num_valid ? int(newest > 0 ? newest : 0) : chunk.num_valid;
    const int begin = chunk.first_block * kBlockTokens, end = chunk.num_blocks() * kBlockTokens;
    if (first >= last) {
      for (int i = begin; i < end; i += 32) S::store_bytes((uint8_t*)(weights + i), S::zero_bytes());
      *rescale = 1.0f;
      return false;
    }
    F s[kChunkTokens / 16];
    F top = S::splat(kNegativeInfinity);
    for (int v = 0; v < kChunkTokens / 16; ++v) {
      s[v] = S::select_range(first - 16 * v, last - 16 * v, S::load(scores + 16 * v), S::splat(kNegativeInfinity));
      top = S::max(top, s[v]);
    }
    const float row_top = S::max_lane(top);
    const float maximum = state[0] > row_top ? state[0] : row_top;
    F total = S::zero();
    for (int v = 0; v < kChunkTokens / 16; ++v) {
      const F weight = vector_exp2<S>(S::sub(s[v], S::splat(maximum)));
      S::store_bf16(weights + 16 * v, weight);
      total = S::add(total, weight);
    }
    *rescale = first_lane(vector_exp2<S>(S::splat(state[0] - maximum)));
    state[0] = maximum;
    state[1] = state[1] * *rescale + S::sum(total);
    return true;
  }

  // output = output * rescale + weights * values, for 16 * kVectors channels.
  template <int R, int kVectors>
  static void add_values(int head_dim, int d, const Chunk& chunk, const uint16_t* weights, const float* rescale,
                         float* states, int64_t stride) {
    F acc[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = S::mul(S::load(output(states + r * stride) + d + 16 * v), S::splat(rescale[r]));
    for (int b = chunk.first_block; b < chunk.num_blocks(); ++b) {
      const int rest = chunk.num_valid - b * kBlockTokens;
      const int num_valid = rest < kBlockTokens ? rest : kBlockTokens;
      const uint16_t* w = weights + b * kBlockTokens;
      with_block(chunk.blocks[b], head_dim, [&](const auto& block) {
        for (int t = 0; t < num_valid; t += 2) {
          typename S::B pairs[kVectors];
          for (int v = 0; v < kVectors; ++v) pairs[v] = block.value_pairs(t, d + 16 * v);
          for (int r = 0; r < R; ++r) {
            const typename S::X pair = S::splat_four((const int8_t*)(w + r * kChunkTokens + t));
            for (int v = 0; v < kVectors; ++v) acc[r][v] = S::dot_bf16(acc[r][v], pairs[v], pair);
          }
        }
      });
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) S::store(output(states + r * stride) + d + 16 * v, acc[r][v]);
  }
};

}  // namespace tael
