#include <algorithm>
#include <cmath>

#include "common/half.hpp"
#include "kernels/key_summary/key_summary.hpp"

namespace tael {
namespace {

constexpr int kPieceTokens = kBlockTokens / kSummaryPieces;

struct Bounds {
  float least = INFINITY, largest = -INFINITY, nan = 0.0f;

  void add(float low, float high) {
    least = low < least ? low : least;
    largest = high > largest ? high : largest;
    if (low != low) nan = low;
  }
  void store(uint16_t* bounds) const {
    bounds[0] = float_to_bf16(least + nan);
    bounds[1] = float_to_bf16(largest + nan);
  }
};

// Where a range is infinite or NaN, the whole of it.
uint8_t packed_piece(const Bounds& piece, const Bounds& block) {
  const float step = (block.largest - block.least) * (1.0f / 15);
  if (step == 0.0f) return 0;
  if (!(step < INFINITY)) return 0xf0;
  const float low = std::floor((piece.least - block.least) / step);
  const float high = std::ceil((piece.largest - block.least) / step);
  return uint8_t(std::clamp(low, 0.0f, 15.0f)) | uint8_t(std::clamp(high, 0.0f, 15.0f)) << 4;
}

}  // namespace

void summarize_keys(const uint16_t* keys, int head_dim, uint8_t* summary) {
  for (int d = 0; d < head_dim; ++d) {
    Bounds block, pieces[kSummaryPieces];
    for (int t = 0; t < kBlockTokens; ++t) {
      const float x = bf16_to_float(keys[key_place(head_dim, t, d)]);
      pieces[t / kPieceTokens].add(x, x);
    }
    for (const Bounds& piece : pieces) block.add(piece.least + piece.nan, piece.largest + piece.nan);
    block.store((uint16_t*)summary + 2 * d);
    for (int p = 0; p < kSummaryPieces; ++p)
      summary[bounds_bytes(head_dim) + p * head_dim + d] = packed_piece(pieces[p], block);
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
