#include "model/block_selection.hpp"

#include <cmath>
#include <functional>

#include "common/half.hpp"

namespace tael {
namespace {

// Greater for higher scores, and of equal ones for lower indices: one number, so that comparing takes no detour.
uint64_t rank(float score, uint32_t index) {
  const uint32_t bits = float_to_bits(std::isnan(score) ? INFINITY : score + 0.0f);  // -0 becomes 0
  return uint64_t(bits >> 31 ? ~bits : bits | 1u << 31) << 32 | uint32_t(~index);
}

}  // namespace

void BlockSelection::find_best(int num, int count) {
  uint64_t* first = best.data();
  for (int i = 0; i < num; ++i) first[i] = rank(scores.data()[i], uint32_t(i));
  std::nth_element(first, first + count, first + num, std::greater<>());
  for (int i = 0; i < count; ++i) first[i] = ~uint32_t(first[i]);
  std::sort(first, first + count);
}

void BlockSelection::keep_best(int num, int count) {
  find_best(num, count);
  for (int i = 0; i < count; ++i) candidates.data()[i] = candidates.data()[best.data()[i]];
}

}  // namespace tael
