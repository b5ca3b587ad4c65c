// What is known of the keys of a block without reading them: the least and the largest of every channel (Quest,
// arXiv:2406.10774), and in which quarter between these each key is.
//
//     bounds   [head_dim][least, largest] bf16
//     codes    [kBlockTokens / 16][head_dim / 16][16 keys][4] bytes, of which byte c holds the quarters of channels
//              c, 4 + c, 8 + c and 12 + c, from its lowest bits up
//
// Candidates are chosen by the bounds, and the best of these by what their keys score when each channel is in the
// middle of its quarter. As upper bounds,
//
//     q . k <= sum over channels of max(q * least, q * largest),
//
// the bounds promise far more than there is: no key is at the end of every channel. With a quarter of the
// nearer ends added, the candidates hold 86% of the 8 blocks that score highest, and not 79% (Qwen2.5 1.5B behind 32K
// tokens, of 55 blocks that are read, among four times as many).
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/half.hpp"
#include "common/unrolled.hpp"
#include "kernels/types.hpp"
#include "simd/has_tiles.hpp"

namespace tael {

constexpr int64_t bounds_bytes(int head_dim) { return 4 * int64_t(head_dim); }
constexpr int64_t codes_bytes(int head_dim) { return kBlockTokens / 4 * int64_t(head_dim); }
constexpr int64_t summary_bytes(int head_dim) { return bounds_bytes(head_dim) + codes_bytes(head_dim); }

// Of the keys of one head in bf16. One that is not finite makes the bounds of its channel NaN, and with them the
// score, which is then the highest (find_best): what is broken is not passed over. Plain C++, as pack_head.
void summarize_keys(const uint16_t* keys, int head_dim, uint8_t* summary);

// The bounds of all keys of several blocks, from theirs. `summaries` is of the first block of the pool,
// block_bytes between them. A NaN stays one.
void merge_bounds(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes, int head_dim,
                  uint16_t* bounds);

// Calls fn with constants that add up to the rows of a task, and the first row of each. So many share what is
// loaded and unpacked.
template <class S, class Fn> void for_rows(const AttentionTask& task, Fn fn) {
  constexpr int kMost = std::max(4, S::kAttentionRows);
  for (int row = 0; row < task.num_rows(); row += kMost) {
    const int num_rows = std::min(kMost, task.num_rows() - row);
    unrolled([&](auto i) {
      if (i + 1 == num_rows) fn(std::integral_constant<int, i + 1>{}, row);
    }, std::make_integer_sequence<int, kMost>{});
  }
}

inline void prefetch(const uint8_t* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at);
}

// The larger of what the rows of a block score. A NaN is the largest.
inline void keep_larger(float& score, float other, bool is_first) {
  if (is_first || !(other <= score)) score = other;
}

// What is multiplied with the least and the largest key of a channel.
inline void split_query(uint16_t query, uint16_t* parts) {
  const bool negative = query >> 15;
  const uint16_t quarter = float_to_bf16(0.25f * bf16_to_float(query));
  parts[0] = negative ? query : quarter;
  parts[1] = negative ? quarter : query;
}

template <class S, int kRows>
void score_bounds_of_rows(const AttentionTask& task, int first_row, const uint8_t* summaries, int64_t block_bytes,
                          int num_blocks, float* scores) {
  constexpr int kBlocks = 2, kAhead = 8;  // that share what is loaded; that are fetched before
  constexpr int kFours = (kRows + 3) / 4;
  const int head_dim = task.head_dim;
  const auto summary = [&](int b) { return summaries + task.block_table[b] * block_bytes; };
  const auto fetch = [&](int b) {
    if (first_row == 0 && b < num_blocks) prefetch(summary(b), bounds_bytes(head_dim));
  };
  for (int b = 0; b < kAhead; ++b) fetch(b);
  alignas(64) uint16_t parts[kRows][2 * kMaxHeadDim];
  for (int r = 0; r < kRows; ++r)
    for (int d = 0; d < head_dim; ++d) split_query(task.query(first_row + r)[d], parts[r] + 2 * d);
  for (int b = 0; b < num_blocks; b += kBlocks) {
    for (int i = 0; i < kBlocks; ++i) fetch(b + kAhead + i);
    const int second = b + 1 < num_blocks ? b + 1 : b;
    const uint8_t* const pair[kBlocks] = {summary(b), summary(second)};
    typename S::F sums[kBlocks][4 * kFours];
    for (int i = 0; i < kBlocks; ++i)
      for (int r = 0; r < kRows; ++r) sums[i][r] = S::zero();
    for (int d = 0; d < head_dim; d += 16) {
      const typename S::B first = S::load_bytes(pair[0] + 4 * d), next = S::load_bytes(pair[1] + 4 * d);
      for (int r = 0; r < kRows; ++r) {
        const typename S::B part = S::load_bytes((const uint8_t*)(parts[r] + 2 * d));
        sums[0][r] = S::dot_bf16(sums[0][r], first, part);
        sums[1][r] = S::dot_bf16(sums[1][r], next, part);
      }
    }
    for (int i = 0; i < kBlocks && b + i < num_blocks; ++i) {
      for (int r = kRows; r < 4 * kFours; ++r) sums[i][r] = sums[i][kRows - 1];
      for (int four = 0; four < kFours; ++four)
        keep_larger(scores[b + i], S::largest_sum(sums[i] + 4 * four), first_row == 0 && four == 0);
    }
  }
}

// 32 blocks and 16 rows of the task at a time: bounds of blocks are the rows of tiles, queries their columns.
template <class S>
void score_bounds_in_tiles(const AttentionTask& task, int first_row, const uint8_t* summaries, int64_t block_bytes,
                           int num_blocks, float* scores) {
  constexpr int kBlocks = 32, kColumns = 16;
  const int head_dim = task.head_dim;
  const auto summary = [&](int b) { return summaries + task.block_table[b] * block_bytes; };
  const auto fetch = [&](int b) {
    if (first_row == 0 && b < num_blocks) prefetch(summary(b), bounds_bytes(head_dim));
  };
  for (int b = 0; b < kBlocks; ++b) fetch(b);
  alignas(64) uint16_t queries[kMaxHeadDim][kColumns][2], bounds[kBlocks][2 * kMaxHeadDim];
  alignas(64) float sums[kBlocks][kColumns];
  for (int c = 0; c < kColumns; ++c) {
    const uint16_t* query = task.query(std::min(first_row + c, task.num_rows() - 1));
    for (int d = 0; d < head_dim; ++d) split_query(query[d], queries[d][c]);
  }
  const typename S::template Tiles<kColumns> tiles(kBlocks);
  for (int first = 0; first < num_blocks; first += kBlocks) {
    for (int i = 0; i < kBlocks; ++i) {
      fetch(first + kBlocks + i);
      const uint8_t* block = summary(std::min(first + i, num_blocks - 1));
      for (int64_t at = 0; at < bounds_bytes(head_dim); at += 64)
        S::store_bytes((uint8_t*)bounds[i] + at, S::load_bytes(block + at));
    }
    tiles.multiply(
        head_dim / 16, [&](int i) { return typename S::TileStep{bounds[0] + 32 * i, queries[16 * i][0], nullptr}; },
        2 * kMaxHeadDim, 2 * kColumns, 0, sums[0], kColumns);
    for (int i = 0; i < kBlocks && first + i < num_blocks; i += 4) {
      typename S::F four[4];
      for (int j = 0; j < 4; ++j) four[j] = S::load(sums[i + j]);
      float largest[4];
      S::store_maxima(largest, four);
      for (int j = 0; j < 4 && first + i + j < num_blocks; ++j)
        keep_larger(scores[first + i + j], largest[j], first_row == 0);
    }
  }
}

// Scores of blocks for the queries of a task: of each block the largest over the rows. `summaries` is of
// the first block of the pool, block_bytes between them, and need not have codes.
template <class S> void score_bounds(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                     int num_blocks, float* scores) {
  if constexpr (HasTiles<S>) {
    for (int row = 0; row < task.num_rows(); row += 16)
      score_bounds_in_tiles<S>(task, row, summaries, block_bytes, num_blocks, scores);
  } else {
    for_rows<S>(task, [&](auto rows, int first_row) {
      score_bounds_of_rows<S, rows>(task, first_row, summaries, block_bytes, num_blocks, scores);
    });
  }
}

template <class S, int kRows>
void score_codes_of_rows(const AttentionTask& task, int first_row, const uint8_t* summaries, int64_t block_bytes,
                         int num_blocks, float* scores) {
  constexpr int kAhead = 4;  // blocks that are fetched before
  constexpr int kFours = (kRows + 3) / 4;
  const int head_dim = task.head_dim;
  const auto summary = [&](int b) { return summaries + task.block_table[b] * block_bytes; };
  const auto fetch = [&](int b) {
    if (first_row == 0 && b < num_blocks) prefetch(summary(b), summary_bytes(head_dim));
  };
  const typename S::F quarter = S::splat(0.25f), half = S::splat(0.5f);
  float queries[kRows][kMaxHeadDim];
  for (int r = 0; r < kRows; ++r)
    for (int d = 0; d < head_dim; ++d) queries[r][d] = bf16_to_float(task.query(first_row + r)[d]);
  for (int b = 0; b < kAhead; ++b) fetch(b);
  for (int b = 0; b < num_blocks; ++b) {
    fetch(b + kAhead);
    const uint16_t* bounds = (const uint16_t*)summary(b);
    const uint8_t* codes = summary(b) + bounds_bytes(head_dim);
    // A key is least + (code + 1/2) * step; queries are multiplied with the steps, and that is rounded to int8.
    float products[kRows][kMaxHeadDim], base[4 * kFours], most[4 * kFours], of_codes[4 * kFours];
    typename S::F bases[4 * kFours], magnitudes[4 * kFours], largest[4 * kFours];
    for (int r = 0; r < 4 * kFours; ++r) bases[r] = magnitudes[r] = largest[r] = S::zero();
    for (int d = 0; d < head_dim; d += 16) {
      const typename S::F least = S::load_bf16_even(bounds + 2 * d), end = S::load_bf16_odd(bounds + 2 * d);
      const typename S::F step = S::mul(S::sub(end, least), quarter), lowest = S::fma(half, step, least);
      for (int r = 0; r < kRows; ++r) {
        const typename S::F query = S::load(queries[r] + d), product = S::mul(query, step);
        S::store(products[r] + d, product);
        bases[r] = S::fma(query, lowest, bases[r]);
        magnitudes[r] = S::max(magnitudes[r], S::abs(product));
      }
    }
    for (int four = 0; four < 4 * kFours; four += 4) {
      S::store_sums(base + four, bases + four);
      S::store_maxima(most + four, magnitudes + four);
    }
    int8_t weights[kRows][kMaxHeadDim];
    for (int r = 0; r < kRows; ++r) {
      const typename S::F inverse = S::splat(most[r] > 0 ? 127 / most[r] : 0.0f);
      for (int d = 0; d < head_dim; d += 16)
        S::store_rounded_s8(weights[r] + d, S::mul(S::load(products[r] + d), inverse));
    }
    typename S::I sums[kRows][2];
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = S::splat_int(0);
    for (int d = 0; d < head_dim; d += 16) {
      const typename S::B packed[2] = {S::load_bytes(codes + 4 * d), S::load_bytes(codes + 4 * (head_dim + d))};
      unrolled([&](auto plane) {
        for (int h = 0; h < 2; ++h) {
          const typename S::B four = S::template or_bits2<2 * plane, 0>(S::zero_bytes(), packed[h]);
          for (int r = 0; r < kRows; ++r)
            sums[r][h] = S::template dot<0>(sums[r][h], four, S::splat_four(weights[r] + d + 4 * plane));
        }
      }, std::make_integer_sequence<int, 4>{});
    }
    for (int r = 0; r < kRows; ++r) largest[r] = S::max(S::from_int(sums[r][0]), S::from_int(sums[r][1]));
    for (int four = 0; four < 4 * kFours; four += 4) S::store_maxima(of_codes + four, largest + four);
    for (int r = 0; r < kRows; ++r)
      keep_larger(scores[b], base[r] + most[r] * (1.0f / 127) * of_codes[r], first_row == 0 && r == 0);
  }
}

// The same by the codes, of each block the largest over the rows and its keys.
template <class S> void score_codes(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                    int num_blocks, float* scores) {
  for_rows<S>(task, [&](auto rows, int first_row) {
    score_codes_of_rows<S, rows>(task, first_row, summaries, block_bytes, num_blocks, scores);
  });
}

}  // namespace tael
