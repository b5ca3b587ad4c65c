// Rotary position embedding of one head, channel i paired with channel i + num_pairs; and the
// rounding to bf16 in which queries, keys and values go on.
#pragma once

#include "kernels/types.hpp"

namespace tael {

template <class S> void rope(float* head, const float* cos, const float* sin, int num_pairs) {
  using F = typename S::F;
  int i = 0;
  for (; i + 16 <= num_pairs; i += 16) {
    const F a = S::load(head + i), b = S::load(head + i + num_pairs);
    const F c = S::load(cos + i), s = S::load(sin + i);
    S::store(head + i, S::sub(S::mul(a, c), S::mul(b, s)));
    S::store(head + i + num_pairs, S::add(S::mul(b, c), S::mul(a, s)));
  }
  for (; i < num_pairs; ++i) {
    const float a = head[i], b = head[i + num_pairs];
    head[i] = a * cos[i] - b * sin[i];
    head[i + num_pairs] = b * cos[i] + a * sin[i];
  }
}

template <class S> void to_bf16(const float* x, float factor, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < columns; c += 16) S::store_bf16(out + c, S::mul(S::load(x + c), S::splat(factor)));
}

}  // namespace tael
