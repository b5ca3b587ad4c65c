// out = x / sqrt(mean(x^2) + eps) * weight, and additions to the residual stream.
#pragma once

#include "kernels/types.hpp"

namespace tael {

template <class S> typename S::F inverse_rms(const float* x, int64_t columns, float eps) {
  typename S::F squares = S::zero();
  for (int64_t c = 0; c < (columns + 15) / 16 * 16; c += 16) {
    const typename S::F v = S::load(x + c);
    squares = S::fma(v, v, squares);
  }
  return S::splat(1.0f / __builtin_sqrtf(S::sum(squares) / float(columns) + eps));
}

// `columns` divides the mean; x, weight and out are zero from there to padded_columns(columns).
template <class S> void rms_norm(const float* x, const float* weight, int64_t columns, float eps, float* out) {
  const typename S::F scale = inverse_rms<S>(x, columns, eps);
  for (int64_t c = 0; c < (columns + 15) / 16 * 16; c += 16)
    S::store(out + c, S::mul(S::mul(S::load(x + c), scale), S::load(weight + c)));
}

template <class S> void add(float* x, const float* y, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 16) S::store(x + c, S::add(S::load(x + c), S::load(y + c)));
}

// x += rms_norm(y)
template <class S> void add_normed(float* x, const float* y, const float* weight, int64_t columns, float eps) {
  const typename S::F scale = inverse_rms<S>(y, columns, eps);
  for (int64_t c = 0; c < (columns + 15) / 16 * 16; c += 16)
    S::store(x + c, S::add(S::load(x + c), S::mul(S::mul(S::load(y + c), scale), S::load(weight + c))));
}

}  // namespace tael
