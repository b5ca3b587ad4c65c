#include "common/half.hpp"
#include "kernels/key_summary/key_summary.hpp"

namespace tael {

void summarize_keys(const uint16_t* keys, int head_dim, uint16_t* summary) {
  for (int d = 0; d < head_dim; ++d) {
    float least = bf16_to_float(keys[key_place(head_dim, 0, d)]), largest = least;
    float nan = 0.0f;
    for (int t = 0; t < kBlockTokens; ++t) {
      const float x = bf16_to_float(keys[key_place(head_dim, t, d)]);
      least = x < least ? x : least;
      largest = x > largest ? x : largest;
      if (x != x) nan = x;
    }
    summary[2 * d] = float_to_bf16(least + nan);
    summary[2 * d + 1] = float_to_bf16(largest + nan);
  }
}

}  // namespace tael
