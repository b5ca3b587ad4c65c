#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/half.hpp"
#include "kernels/key_summary/key_summary.hpp"

namespace tael {
namespace {

struct Bounds {
  float least = INFINITY, largest = -INFINITY, nan = 0.0f;

  void add(float low, float high) {
    least = low < least ? low : least;
    largest = high > largest ? high : largest;
    nan += low - low + (high - high);  // 0 if both are finite
  }
  void store(uint16_t* bounds) const {
    bounds[0] = float_to_bf16(least + nan);
    bounds[1] = float_to_bf16(largest + nan);
  }
};

}  // namespace

void summarize_keys(const uint16_t* keys, int head_dim, uint8_t* summary) {
  uint8_t* codes = summary + bounds_bytes(head_dim);
  memset(codes, 0, codes_bytes(head_dim));
  for (int d = 0; d < head_dim; ++d) {
    float channel[kBlockTokens];
    Bounds bounds;
    for (int t = 0; t < kBlockTokens; ++t) {
      channel[t] = bf16_to_float(keys[key_place(head_dim, t, d)]);
      bounds.add(channel[t], channel[t]);
    }
    bounds.store((uint16_t*)summary + 2 * d);
    const float step = (bounds.largest - bounds.least) * 0.25f;
    if (!(step > 0.0f) || bounds.nan != 0.0f) continue;
    for (int t = 0; t < kBlockTokens; ++t) {
      const int quarter = std::min(3, int((channel[t] - bounds.least) / step));
      codes[(int64_t(t / 16) * head_dim + d / 16 * 16) * 4 + t % 16 * 4 + d % 4] |= quarter << d % 16 / 4 * 2;
    }
  }
}

void merge_bounds(const int32_t* blocks, int num_blocks, const uint8_t* summaries, int64_t block_bytes, int head_dim,
                  uint16_t* bounds) {
  for (int d = 0; d < head_dim; ++d) {
    Bounds all;
    for (int b = 0; b < num_blocks; ++b) {
      const uint16_t* of_block = (const uint16_t*)(summaries + blocks[b] * block_bytes) + 2 * d;
      all.add(bf16_to_float(of_block[0]), bf16_to_float(of_block[1]));
    }
    all.store(bounds + 2 * d);
  }
}

}  // namespace tael
