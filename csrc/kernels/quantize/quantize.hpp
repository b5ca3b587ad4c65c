// Activations to int8: one float scale per 32 columns, round to nearest even, |value| <= 127.
// Groups of less than 1e-36 become zeros.
#pragma once

#include "kernels/types.hpp"

namespace tael {

template <class S>
void quantize(const float* x, int64_t first_group, int64_t num_groups, const QuantizedRows& rows, int64_t token) {
  const int64_t pack = token / rows.pack_size, place = token % rows.pack_size, tokens = rows.pack_tokens(pack);
  uint8_t* group = rows.pack(pack) + first_group * tokens * kGroupBytes;
  for (int64_t g = 0; g < num_groups; ++g, x += kGroupColumns, group += tokens * kGroupBytes) {
    const typename S::F low = S::load(x), high = S::load(x + 16);
    const float largest = S::max_lane(S::max(S::abs(low), S::abs(high)));
    // Below that, 127 / largest would be infinite.
    const typename S::F inverse = S::splat(largest > 1e-36f ? 127.0f / largest : 0.0f);
    int8_t* values = (int8_t*)group + place * kGroupColumns;
    S::store_rounded_s8(values, S::mul(low, inverse));
    S::store_rounded_s8(values + 16, S::mul(high, inverse));
    const float scale = largest / 127.0f;
    const int32_t sums[2] = {S::sum_s8(values), S::sum_s8(values + 16)};
    ((QuantizedGroup*)(group + tokens * kGroupColumns))[place] = {
        scale, scale * float(sums[0] + sums[1]), {sums[0], sums[1]}};
  }
}

}  // namespace tael
