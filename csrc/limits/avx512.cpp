#include "limits/avx512.hpp"

#include <immintrin.h>

namespace tael {

int32_t dot_int8_rounds(int64_t num_rounds) {
  __m512i sums[kDotsPerRound];
  for (int i = 0; i < kDotsPerRound; ++i) sums[i] = _mm512_set1_epi32(i);
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  for (int64_t round = 0; round < num_rounds; ++round) {
    __asm__ volatile("" : "+v"(a), "+v"(b));  // or the sum is computed before it runs
#pragma GCC unroll 16
    for (int i = 0; i < kDotsPerRound; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
  }
  int32_t total = 0;
  for (const __m512i& sum : sums) total += _mm512_reduce_add_epi32(sum);
  return total;
}

float dot_bf16_rounds(int64_t num_rounds) {
  __m512 sums[kDotsPerRound];
  for (int i = 0; i < kDotsPerRound; ++i) sums[i] = _mm512_set1_ps(float(i));
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(0.5f)), b = a;
  for (int64_t round = 0; round < num_rounds; ++round) {
    __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
    for (int i = 0; i < kDotsPerRound; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
  float total = 0;
  for (const __m512& sum : sums) total += _mm512_reduce_add_ps(sum);
  return total;
}

}  // namespace tael
