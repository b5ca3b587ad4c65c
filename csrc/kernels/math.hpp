// exp over a Simd type.
#pragma once

namespace tael {

// exp(x) within 2 units in the last place; 0 below -87.3 (also for -inf), finite at the top.
// Cody-Waite reduction x = n ln 2 + r with |r| <= ln 2 / 2, then a degree-6 polynomial with the
// coefficients of Cephes expf (S. Moshier).
template <class S> typename S::F vector_exp(typename S::F x) {
  using F = typename S::F;
  const F clamped = S::min(S::max(x, S::splat(-87.3f)), S::splat(88.0f));
  const F magic = S::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const F n = S::sub(S::add(S::mul(clamped, S::splat(1.44269504088896341f)), magic), magic);
  F r = S::fma(n, S::splat(-0.693359375f), clamped);
  r = S::fma(n, S::splat(2.12194440e-4f), r);
  F p = S::splat(1.9875691500e-4f);
  p = S::fma(p, r, S::splat(1.3981999507e-3f));
  p = S::fma(p, r, S::splat(8.3334519073e-3f));
  p = S::fma(p, r, S::splat(4.1665795894e-2f));
  p = S::fma(p, r, S::splat(1.6666665459e-1f));
  p = S::fma(p, r, S::splat(5.0000001201e-1f));
  p = S::fma(p, S::mul(r, r), S::add(r, S::splat(1.0f)));
  return S::zero_below(S::scale_exponent(p, n), x, -87.3f);
}

}  // namespace tael
