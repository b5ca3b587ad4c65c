// Which complete blocks a query reads under a budget.
#pragma once

#include <vector>

#include "model/linear.hpp"

namespace tael {

// Blocks that are read whatever their score: the first, which collect attention that belongs nowhere
// (StreamingLLM, arXiv:2309.17453), and the last.
constexpr int kSinkBlocks = 4, kRecentBlocks = 4;
constexpr int kMinBudgetBlocks = kSinkBlocks + kRecentBlocks + 1;  // with the one that the query is in

// Room of one thread for the blocks of one query.
struct BlockSelection {
  Buffer<float> scores;    // of all complete blocks
  Buffer<int32_t> chosen;  // then a block table of those that are read

  explicit BlockSelection(int64_t max_blocks) : scores(max_blocks), chosen(max_blocks + 1) {}
  int64_t bytes() const { return scores.bytes() + chosen.bytes(); }
};

// Chooses `budget` - 1 of the num_blocks complete blocks of a sequence: the sinks, the recent ones, and
// those of the highest score, of equal ones the earliest. Writes their entries of the block table in
// ascending order to selection.chosen; returns their number. A score that is NaN comes first.
int select_blocks(BlockSelection& selection, const int32_t* block_table, int num_blocks, int budget);

}  // namespace tael
