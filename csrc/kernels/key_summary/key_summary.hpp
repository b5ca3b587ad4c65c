// Least and largest key of every channel of a block, which bound the score of any key in it
// (Quest, arXiv:2406.10774), and of pieces of it, which bound it closer:
//
//     bounds   [head_dim][least, largest] bf16
//     pieces   [kSummaryPieces][head_dim] of 8 keys: in the low 4 bits how far the least of them is from the
//              block's least to its largest, in the high 4 bits the largest, in fifteenths, rounded outwards
//
//     q . k <= sum over channels of max(q * least, q * largest)
//
// All candidates are scored by the bounds, and the best of these by their pieces.
#pragma once

#include <algorithm>

#include "common/half.hpp"
#include "kernels/types.hpp"

namespace tael {

constexpr int kSummaryPieces = 4;

constexpr int64_t bounds_bytes(int head_dim) { return 4 * int64_t(head_dim); }
constexpr int64_t summary_bytes(int head_dim) { return bounds_bytes(head_dim) + kSummaryPieces * int64_t(head_dim); }

// Of the keys of one head in bf16. A NaN makes both NaN, and with them the score, which is then the
// highest (find_best): what is broken is not passed over. Plain C++, as pack_head.
void summarize_keys(const uint16_t* keys, int head_dim, uint8_t* summary);

// The bounds of all keys of several blocks, from theirs. `summaries` is of the first block of the pool,
// block_bytes between them. A NaN stays one.
void merge_bounds(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes, int head_dim,
                  uint16_t* bounds);

// Scores of blocks for the queries of a task: of each block the largest bound over the rows. `summaries`
// is of the first block of the pool, block_bytes between them, and need not have pieces.
template <class S> void score_bounds(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                     int num_blocks, float* scores) {
  constexpr int kRows = 4, kBlocks = 2;  // that share what is loaded
  constexpr int kAhead = 8;              // blocks that are fetched before
  const int head_dim = task.head_dim;
  const auto summary = [&](int b) { return summaries + task.block_table[b] * block_bytes; };
  const auto fetch = [&](int b) {
    if (b < num_blocks)
      for (int64_t at = 0; at < bounds_bytes(head_dim); at += 64) __builtin_prefetch(summary(b) + at);
  };
  for (int b = 0; b < kAhead; ++b) fetch(b);
  for (int row = 0; row < task.num_rows(); row += kRows) {
    // Of each channel what is multiplied with the least and the largest key. The last row stands for those
    // that a task has not.
    alignas(64) uint16_t parts[kRows][2 * kMaxHeadDim];
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* query = task.query(row + r < task.num_rows() ? row + r : task.num_rows() - 1);
      for (int d = 0; d < head_dim; ++d) {
        const bool negative = query[d] >> 15;
        parts[r][2 * d] = negative ? query[d] : 0;
        parts[r][2 * d + 1] = negative ? 0 : query[d];
      }
    }
    for (int b = 0; b < num_blocks; b += kBlocks) {
      if (row == 0)
        for (int i = 0; i < kBlocks; ++i) fetch(b + kAhead + i);
      const int second = b + 1 < num_blocks ? b + 1 : b;
      const uint8_t* const pair[kBlocks] = {summary(b), summary(second)};
      typename S::F sums[kBlocks][kRows];
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
        const float sum = S::largest_sum(sums[i]);
        if (row == 0 || !(sum <= scores[b + i])) scores[b + i] = sum;  // a NaN wins
      }
    }
  }
}

// The same, of each block the largest bound over the rows and its pieces.
template <class S> void score_pieces(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                     int num_blocks, float* scores) {
  constexpr int kRows = 8;  // that share what is unpacked
  const int head_dim = task.head_dim;
  const typename S::F fifteenth = S::splat(1.0f / 15), zero = S::zero();
  float queries[kRows][kMaxHeadDim], ends[kSummaryPieces][2][kMaxHeadDim];
  for (int first_row = 0; first_row < task.num_rows(); first_row += kRows) {
    const int num_rows = std::min(kRows, task.num_rows() - first_row);
    for (int r = 0; r < num_rows; ++r)
      for (int d = 0; d < head_dim; ++d) queries[r][d] = bf16_to_float(task.query(first_row + r)[d]);
    for (int b = 0; b < num_blocks; ++b) {
      const uint8_t* summary = summaries + task.block_table[b] * block_bytes;
      const uint8_t* pieces = summary + bounds_bytes(head_dim);
      for (int p = 0; p < kSummaryPieces; ++p)
        for (int d = 0; d < head_dim; d += 16) {
          const typename S::I both = S::load_u8(pieces + p * head_dim + d);
          S::store(ends[p][0] + d, S::from_int(S::and_int(both, 15)));
          S::store(ends[p][1] + d, S::from_int(S::template shr_int<4>(both)));
        }
      for (int r = 0; r < num_rows; ++r) {
        typename S::F of_least = zero, sums[kSummaryPieces] = {zero, zero, zero, zero};
        for (int d = 0; d < head_dim; d += 16) {
          const typename S::F query = S::load(queries[r] + d);
          const typename S::F least = S::load_bf16_even((const uint16_t*)summary + 2 * d);
          const typename S::F range = S::sub(S::load_bf16_odd((const uint16_t*)summary + 2 * d), least);
          // The second argument is what max and min return of a NaN.
          const typename S::F step = S::mul(query, S::mul(range, fifteenth));
          const typename S::F down = S::min(zero, step), up = S::max(zero, step);
          of_least = S::fma(query, least, of_least);
          for (int p = 0; p < kSummaryPieces; ++p)
            sums[p] = S::fma(up, S::load(ends[p][1] + d), S::fma(down, S::load(ends[p][0] + d), sums[p]));
        }
        for (typename S::F& sum : sums) sum = S::add(sum, of_least);
        const float sum = S::largest_sum(sums);
        if ((first_row == 0 && r == 0) || !(sum <= scores[b])) scores[b] = sum;  // a NaN wins
      }
    }
  }
}

}  // namespace tael
