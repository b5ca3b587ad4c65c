// Activations to int8: one float scale per 32 columns, round to nearest even, |value| <= 127.
// Groups of less than 1e-36 become zeros.
#pragma once

#include "kernels/types.hpp"

namespace tael {

// columns is a multiple of 32. sums[i] is the sum of values 16 i to 16 i + 15.
template <class S>
void quantize(const float* x, int64_t columns, int8_t* values, float* scales, int32_t* sums) {
  for (int64_t c = 0; c < columns; c += 32) {
    const typename S::F low = S::load(x + c), high = S::load(x + c + 16);
    const float largest = S::max_lane(S::max(S::abs(low), S::abs(high)));
    // Below that, 127 / largest would be infinite.
    const typename S::F inverse = S::splat(largest > 1e-36f ? 127.0f / largest : 0.0f);
    S::store_rounded_s8(values + c, S::mul(low, inverse));
    S::store_rounded_s8(values + c + 16, S::mul(high, inverse));
    scales[c / 32] = largest / 127.0f;
    sums[c / 16] = S::sum_s8(values + c);
    sums[c / 16 + 1] = S::sum_s8(values + c + 16);
  }
}

}  // namespace tael
