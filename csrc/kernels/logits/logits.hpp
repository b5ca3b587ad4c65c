// What sampling needs to know of a row of logits, gathered a piece at a time while it is in the L1
// cache: maximum, sum of exponentials, and the logits that may be among the largest of the row.
#pragma once

#include "kernels/math.hpp"
#include "kernels/types.hpp"

namespace tael {

template <class S> float largest(const float* x, int64_t count) {
  typename S::F top = S::load(x);
  for (int64_t i = 16; i < count; i += 16) top = S::max(top, S::load(x + i));
  return S::max_lane(top);
}

template <class S> typename S::F exp_below(typename S::F x, float maximum, float factor) {
  return vector_exp<S>(S::mul(S::sub(x, S::splat(maximum)), S::splat(factor)));
}

template <class S> float sum_exp(const float* x, int64_t count, float maximum, float factor) {
  typename S::F sum = S::zero();
  for (int64_t i = 0; i < count; i += 16) sum = S::add(sum, exp_below<S>(S::load(x + i), maximum, factor));
  return S::sum(sum);
}

template <class S>
void rescale_sums(float* sums, const float* maxima, int64_t count, float maximum, float factor) {
  for (int64_t i = 0; i < count; i += 16)
    S::store(sums + i, S::mul(S::load(sums + i), exp_below<S>(S::load(maxima + i), maximum, factor)));
}

template <class S>
int64_t select_at_least(const float* x, int64_t count, float limit, int32_t first_id, Candidate* out) {
  const Candidate* const begin = out;
  for (int64_t i = 0; i < count; i += 16)
    for (uint32_t hits = S::at_least(S::load(x + i), S::splat(limit)); hits; hits &= hits - 1) {
      const int64_t place = i + __builtin_ctz(hits);
      *out++ = {x[place], int32_t(first_id + place)};
    }
  return out - begin;
}

}  // namespace tael
