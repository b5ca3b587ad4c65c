// Avx512 with dot products of bf16 pairs in one instruction. It adds the odd product first, then the
// even one, each rounded once, as Avx512 does in two, but takes subnormal numbers for zero (Intel
// Instruction Set Extensions Programming Reference, VDPBF16PS).
#pragma once

#include "simd/avx512.hpp"

namespace tael {

struct Avx512BF16 : Avx512 {
  static constexpr const char* kName = "avx512_bf16";

  static F dot_bf16(F acc, B a, X b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  static void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
  static B to_bf16(F a, F b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
};

}  // namespace tael
