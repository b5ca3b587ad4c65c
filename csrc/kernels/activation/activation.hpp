// out = activation(gate) * up.
#pragma once

#include "kernels/math.hpp"
#include "kernels/types.hpp"

namespace tael {

// SiLU: x * sigmoid(x). GELU (tanh form): x * sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3),
// since 1 + tanh(u) = 2 sigmoid(2u).
template <class S>
void gated_activation(Activation kind, const float* gate, const float* up, int64_t columns, float* out) {
  using F = typename S::F;
  for (int64_t c = 0; c < columns; c += 16) {
    const F x = S::load(gate + c);
    F exponent = x;
    if (kind == Activation::GeluTanh) {
      const F cubic = S::fma(S::mul(x, x), S::splat(0.044715f), S::splat(1.0f));
      exponent = S::mul(S::mul(x, cubic), S::splat(1.5957691216057308f));  // 2 sqrt(2 / pi)
    }
    const F denominator = S::add(S::splat(1.0f), vector_exp<S>(S::sub(S::zero(), exponent)));
    S::store(out + c, S::mul(S::div(x, denominator), S::load(up + c)));
  }
}

}  // namespace tael
