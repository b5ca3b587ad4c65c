// Exponentials over a Simd type. min and max return their second argument where one is NaN, so
// that NaN stays NaN.
#pragma once

namespace tael {

// 2^n * 2^f of x = n + f, |f| <= 1/2, for x between -126 and 127.
template <class S> typename S::F power_of_two(typename S::F n, typename S::F f) {
  // Taylor's series of exp(f ln 2) to degree 6: within 2 units in the last place.
  typename S::F p = S::splat(1.5403530e-4f);
  p = S::fma(p, f, S::splat(1.3333558e-3f));
  p = S::fma(p, f, S::splat(9.6181291e-3f));
  p = S::fma(p, f, S::splat(5.5504109e-2f));
  p = S::fma(p, f, S::splat(2.4022651e-1f));
  p = S::fma(p, f, S::splat(6.9314718e-1f));
  p = S::fma(p, f, S::splat(1.0f));
  return S::scale_exponent(p, n);
}

// 2^x within 2 units in the last place; 0 below -126 (also for -inf), finite at the top.
template <class S> typename S::F vector_exp2(typename S::F x) {
  using F = typename S::F;
  const F clamped = S::min(S::splat(127.0f), S::max(S::splat(-126.0f), x));
  const F n = S::nearest(clamped);
  return S::zero_below(power_of_two<S>(n, S::sub(clamped, n)), x, -126.0f);
}

// exp(x) within 3 units in the last place; 0 below -87.3 (also for -inf), finite at the top.
// Cody-Waite reduction: x = n ln 2 + r with ln 2 in two parts.
template <class S> typename S::F vector_exp(typename S::F x) {
  using F = typename S::F;
  const F clamped = S::min(S::splat(88.0f), S::max(S::splat(-87.3f), x));
  const F n = S::nearest(S::mul(clamped, S::splat(1.44269504088896341f)));
  F r = S::fma(n, S::splat(-0.693359375f), clamped);
  r = S::fma(n, S::splat(2.12194440e-4f), r);
  return S::zero_below(power_of_two<S>(n, S::mul(r, S::splat(1.44269504088896341f))), x, -87.3f);
}

}  // namespace tael
