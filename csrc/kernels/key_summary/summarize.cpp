#include <cmath>

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

void merge_summaries(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes,
                     int head_dim, uint16_t* summary) {
  for (int d = 0; d < head_dim; ++d) {
    float least = INFINITY, largest = -INFINITY, nan = 0.0f;
    for (int b = 0; b < num_blocks; ++b) {
      const uint16_t* of_block = (const uint16_t*)(summaries + blocks[b] * block_bytes) + 2 * d;
      const float low = bf16_to_float(of_block[0]), high = bf16_to_float(of_block[1]);
      least = low < least ? low : least;
      largest = high > largest ? high : largest;
      if (low != low) nan = low;
    }
    summary[2 * d] = float_to_bf16(least + nan);
    summary[2 * d + 1] = float_to_bf16(largest + nan);
  }
}

}  // namespace tael
