// Loops of the AVX-512 dot products alone, compiled apart from the rest.
#pragma once

#include <cstdint>

namespace tael {

// Each runs num_rounds rounds of kDotsPerRound independent dot products and returns their sum, so
// that none can be left out.
constexpr int kDotsPerRound = 16;
int32_t dot_int8_rounds(int64_t num_rounds);
float dot_bf16_rounds(int64_t num_rounds);

}  // namespace tael
