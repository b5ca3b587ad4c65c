// What LDTILECFG loads: the shape of each tile of AMX. Included by object files that are compiled for it only.
#pragma once

#include <cstdint>

namespace tael {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

}  // namespace tael
