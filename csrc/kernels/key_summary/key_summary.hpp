// Least and largest key of every channel of a block, which bound the score of any key in it
// (Quest, arXiv:2406.10774):
//
//     summary  [head_dim][least, largest] bf16
//     q . k <= sum over channels of max(q * least, q * largest)
#pragma once

#include "common/half.hpp"
#include "kernels/types.hpp"

namespace tael {

constexpr int64_t summary_bytes(int head_dim) { return 4 * int64_t(head_dim); }

// Of the keys of one head in bf16. A NaN makes both NaN, and with them the score, which is then the
// highest (find_best): what is broken is not passed over. Plain C++, as pack_head.
void summarize_keys(const uint16_t* keys, int head_dim, uint16_t* summary);

// Of all keys of several blocks, from their summaries. `summaries` is of the first block of the pool,
// block_bytes between them. A NaN stays one.
void merge_summaries(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes,
                     int head_dim, uint16_t* summary);

// Scores of blocks for the queries of a task: of each block the largest bound over the rows. `summaries`
// is of the first block of the pool, block_bytes between them.
template <class S> void score_blocks(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                     int num_blocks, float* scores) {
  constexpr int kRows = 4, kBlocks = 2;  // that share what is loaded
  constexpr int kAhead = 8;              // blocks that are fetched before
  const int head_dim = task.head_dim;
  const auto summary = [&](int b) { return summaries + task.block_table[b] * block_bytes; };
  const auto fetch = [&](int b) {
    if (b < num_blocks)
      for (int64_t at = 0; at < summary_bytes(head_dim); at += 64) __builtin_prefetch(summary(b) + at);
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

}  // namespace tael
