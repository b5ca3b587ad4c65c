#include "model/block_selection.hpp"

#include <cmath>
#include <numeric>

namespace tael {

void BlockSelection::find_best(int num, int count) {
  const float* scores = this->scores.data();
  int32_t* first = best.data();
  std::iota(first, first + num, 0);
  std::nth_element(first, first + count, first + num, [&](int32_t a, int32_t b) {
    const float x = std::isnan(scores[a]) ? INFINITY : scores[a], y = std::isnan(scores[b]) ? INFINITY : scores[b];
    return x > y || (x == y && a < b);
  });
  std::sort(first, first + count);
}

}  // namespace tael
