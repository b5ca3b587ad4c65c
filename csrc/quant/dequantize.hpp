// One row of a tile in float: embedding look-ups, and the check that repacking lost nothing.
#pragma once

#include <cstdint>

#include "quant/formats.hpp"

namespace tael {

// out[columns] receives row 0 <= row < 16 of `tile`, bitwise as tael/quant/dequantize.py has it.
void dequantize_row(Format format, const uint8_t* tile, int row, int64_t columns, float* out);

}  // namespace tael
