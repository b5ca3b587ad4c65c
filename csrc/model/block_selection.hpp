// Which complete blocks a query reads under a budget.
#pragma once

#include <algorithm>

#include "model/linear.hpp"

namespace tael {

// Blocks that are read whatever their score: the first, which collect attention that belongs nowhere
// (StreamingLLM, arXiv:2309.17453), and the last.
constexpr int kSinkBlocks = 4, kRecentBlocks = 4;
constexpr int kMinBudgetBlocks = kSinkBlocks + kRecentBlocks + 1;  // with the one that the query is in

// Blocks that a layer with `percent` of a budget reads.
constexpr int budget_of_layer(int budget, int percent) { return std::max(kMinBudgetBlocks, budget * percent / 100); }

// Superblocks whose blocks are scored, where a sequence has more than that. They hold four times the budget
// (in whole superblocks), and at least 32,768 tokens.
constexpr int num_scored_superblocks(int budget) { return std::max(32, budget / 8); }

// Blocks whose codes are scored, for each that is read: those that the bounds prefer. With Qwen2.5 1.5B behind 32K
// tokens 4 choose no better.
constexpr int kCandidates = 3;

// Of tokens that choose together, every other does: the one beside it wants much the same.
constexpr int kChooserStep = 2;

// Room of one thread for the blocks of one choice.
struct BlockSelection {
  Buffer<float> scores;        // of superblocks, then of candidates
  Buffer<uint64_t> best;       // indices of the highest of them
  Buffer<int32_t> candidates;  // entries of a block table
  Buffer<int32_t> chosen;      // likewise, of the blocks that are read
  Buffer<uint16_t> queries;    // of the tokens that choose

  BlockSelection(int64_t max_blocks, int64_t max_queries)
      : scores(max_blocks), best(max_blocks), candidates(max_blocks), chosen(max_blocks + 1), queries(max_queries) {}
  int64_t bytes() const {
    return scores.bytes() + best.bytes() + candidates.bytes() + chosen.bytes() + queries.bytes();
  }

  // The `count` highest of `num` scores, of equal ones the first, ascending in `best`. NaN is the highest.
  void find_best(int num, int count);
  // Leaves those of the candidates, in their order.
  void keep_best(int num, int count);
};

}  // namespace tael
