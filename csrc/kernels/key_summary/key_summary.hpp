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
// highest (select_blocks): what is broken is not passed over. Plain C++, as pack_head.
void summarize_keys(const uint16_t* keys, int head_dim, uint16_t* summary);

// Of all keys of several blocks, from their summaries. `summaries` is of the first block of the pool,
// block_bytes between them. A NaN stays one.
void merge_summaries(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes,
                     int head_dim, uint16_t* summary);

// Scores of blocks for the queries of a task: of each block the largest bound over the rows. `summary`
// is of the first block of the pool, block_bytes between them.
template <class S> void score_blocks(const AttentionTask& task, const uint8_t* summaries, int64_t block_bytes,
                                     int num_blocks, float* scores) {
  using F = typename S::F;
  constexpr int kRows = 4;  // that share what is loaded
  const int head_dim = task.head_dim;
  for (int row = 0; row < task.num_rows(); row += kRows) {
    const int rows = task.num_rows() - row < kRows ? task.num_rows() - row : kRows;
    alignas(64) float above[kRows][kMaxHeadDim], below[kRows][kMaxHeadDim];  // positive and negative part
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < head_dim; ++d) {
        const float x = bf16_to_float(task.query(row + r)[d]);
        above[r][d] = x > 0.0f ? x : 0.0f;
        below[r][d] = x < 0.0f ? x : 0.0f;
      }
    for (int b = 0; b < num_blocks; ++b) {
      const uint16_t* summary = (const uint16_t*)(summaries + task.block_table[b] * block_bytes);
      if (b + 1 < num_blocks)
        for (int64_t at = 0; at < summary_bytes(head_dim); at += 64)
          __builtin_prefetch(summaries + task.block_table[b + 1] * block_bytes + at);
      F sums[kRows];
      for (int r = 0; r < kRows; ++r) sums[r] = S::zero();
      for (int d = 0; d < head_dim; d += 16) {
        const F least = S::load_bf16_even(summary + 2 * d), largest = S::load_bf16_odd(summary + 2 * d);
        for (int r = 0; r < rows; ++r)
          sums[r] = S::fma(S::load(above[r] + d), largest, S::fma(S::load(below[r] + d), least, sums[r]));
      }
      float best = row == 0 ? -__builtin_inff() : scores[b];
      for (int r = 0; r < rows; ++r) {
        const float sum = S::sum(sums[r]);
        best = sum <= best ? best : sum;  // a NaN wins
      }
      scores[b] = best;
    }
  }
}

}  // namespace tael
