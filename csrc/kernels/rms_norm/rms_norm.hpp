// out = x / sqrt(mean(x^2) + eps) * weight, and the residual addition that precedes it.
#pragma once

#include "kernels/types.hpp"

namespace tael {

// `columns` divides the mean; x, weight and out are zero from there to padded_columns(columns).
template <class S> void rms_norm(const float* x, const float* weight, int64_t columns, float eps, float* out) {
  using F = typename S::F;
  const int64_t padded = (columns + 15) / 16 * 16;
  F squares = S::zero();
  for (int64_t c = 0; c < padded; c += 16) {
    const F v = S::load(x + c);
    squares = S::fma(v, v, squares);
  }
  const F scale = S::splat(1.0f / __builtin_sqrtf(S::sum(squares) / float(columns) + eps));
  for (int64_t c = 0; c < padded; c += 16)
    S::store(out + c, S::mul(S::mul(S::load(x + c), scale), S::load(weight + c)));
}

template <class S> void add(float* x, const float* y, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 16) S::store(x + c, S::add(S::load(x + c), S::load(y + c)));
}

}  // namespace tael
