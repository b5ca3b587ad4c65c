#include "model/block_selection.hpp"

#include <algorithm>
#include <cmath>

namespace tael {

int select_blocks(BlockSelection& selection, const int32_t* block_table, int num_blocks, int budget) {
  const float* scores = selection.scores.data();
  int32_t* chosen = selection.chosen.data();
  const int num_scored = budget - 1 - kSinkBlocks - kRecentBlocks;
  int32_t* const begin = chosen + kSinkBlocks;
  int32_t* end = begin;
  for (int i = 0; i < kSinkBlocks; ++i) chosen[i] = i;
  for (int i = kSinkBlocks; i < num_blocks - kRecentBlocks; ++i) *end++ = i;
  std::nth_element(begin, begin + num_scored, end, [&](int32_t a, int32_t b) {
    const float x = std::isnan(scores[a]) ? INFINITY : scores[a], y = std::isnan(scores[b]) ? INFINITY : scores[b];
    return x > y || (x == y && a < b);
  });
  std::sort(begin, begin + num_scored);
  end = begin + num_scored;
  for (int i = num_blocks - kRecentBlocks; i < num_blocks; ++i) *end++ = i;
  for (int32_t* i = chosen; i < end; ++i) *i = block_table[*i];
  return int(end - chosen);
}

}  // namespace tael
