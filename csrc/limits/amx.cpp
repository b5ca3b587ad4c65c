#include "limits/amx.hpp"

#include <immintrin.h>

#include "simd/tile_shapes.hpp"

namespace tael {
namespace {

// Calls fn with all tiles whole and zero.
template <class Fn> void with_tiles(Fn&& fn) {
  TileShapes().load();
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
