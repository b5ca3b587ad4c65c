// Loops of the products of whole tiles alone, compiled apart from the rest.
#pragma once

#include <cstdint>

namespace tael {

// Each runs num_rounds rounds of kProductsPerRound independent products of 16 x 64 bytes and 64 x 16.
constexpr int kProductsPerRound = 4;
void multiply_int8_tiles(int64_t num_rounds);
void multiply_bf16_tiles(int64_t num_rounds);

}  // namespace tael
