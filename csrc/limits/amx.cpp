#include "limits/amx.hpp"

#include <immintrin.h>

#include <cstdint>

namespace tael {
namespace {

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Calls fn with all tiles whole and zero.
template <class Fn> void with_tiles(Fn&& fn) {
  const Shapes shapes;
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  fn();
  _tile_release();
}

}  // namespace

void multiply_int8_tiles(int64_t num_rounds) {
  with_tiles([&] {
    for (int64_t round = 0; round < num_rounds; ++round) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  });
}

void multiply_bf16_tiles(int64_t num_rounds) {
  with_tiles([&] {
    for (int64_t round = 0; round < num_rounds; ++round) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  });
}

}  // namespace tael
