// Simd over one zmm register. See portable.hpp for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tael {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  using F = __m512;
  using I = __m512i;
  using B = __m512i;
  using X = __m512i;

  // 24 accumulators, integer and float, of 32 registers; one broadcast serves two dot products.
  // To unpack tiles for each of 8 packs took 2 to 14% less than a panel, for two packs 35 to 55% less (Zen 4).
  static constexpr int kPanelTiles = 2, kPanelTokens = 6, kTileTokens = 6, kTilePacks = 8;
  static constexpr bool kIdleUnits = true;  // beside dot products
  static constexpr int kAttentionRows = 8;

  static F zero() { return _mm512_setzero_ps(); }
  static F splat(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F load_f16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F load_bf16_even(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static F load_bf16_odd(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
  }
  static F splat_bf16_pair(const uint16_t* p) {
    const __m512i both = splat_four((const int8_t*)p);
    return _mm512_mask_blend_ps(0xaaaa, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), odd_bf16(both));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static __mmask16 range(int first, int last) {
    return __mmask16((last <= 0 ? 0u : 0xffffu >> (16 - (last > 16 ? 16 : last))) &
                     (first <= 0 ? 0xffffu : first >= 16 ? 0u : 0xffffu << first));
  }
  static F select_range(int first, int last, F a, F b) {
    return _mm512_mask_blend_ps(range(first, last), b, a);
  }
  static float sum(F a) {
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
  static float largest_sum(const F* a) {
    const __m128 s4 = across<Sum>(a);
    const __m128 m2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
  }
  static void store_sums(float* p, const F* a) { _mm_storeu_ps(p, across<Sum>(a)); }
  static void store_maxima(float* p, const F* a) { _mm_storeu_ps(p, across<Max>(a)); }
  static float max_lane(F a) { return _mm512_reduce_max_ps(a); }
  static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static F from_int(I a) { return _mm512_cvtepi32_ps(a); }
  static F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale_exponent(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F zero_below(F a, F x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(limit), _CMP_NLT_UQ), a);
  }

  static I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static I load_s8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static I and_int(I a, int32_t mask) { return _mm512_and_si512(a, splat_int(mask)); }
  static I or_int(I a, I b) { return _mm512_or_si512(a, b); }
  template <int n> static I shl_int(I a) { return _mm512_slli_epi32(a, n); }
  template <int n> static I shr_int(I a) { return _mm512_srai_epi32(a, n); }
  static void store_rounded_s8(int8_t* p, F a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
  }
  static int32_t sum_s8(const int8_t* p) {
    return _mm512_reduce_add_epi32(load_s8((const uint8_t*)p));
  }

  static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B low_nibbles(B a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static B high_nibbles(B a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
  }
  template <int from, int to> static B or_bit(B a, B plane) {
    const __mmask64 set = _mm512_test_epi8_mask(plane, _mm512_set1_epi8(char(1 << from)));
    return _mm512_or_si512(a, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(char(1 << to))));
  }
  template <int from, int to> static B or_bits2(B a, B plane) {
    const B moved = from >= to ? _mm512_srli_epi16(plane, from >= to ? from - to : 0)
                               : _mm512_slli_epi16(plane, from >= to ? 0 : to - from);
    return _mm512_ternarylogic_epi32(a, moved, _mm512_set1_epi8(char(3 << to)), 0xf8);  // a | (m & c)
  }
  static B zero_bytes() { return _mm512_setzero_si512(); }
  static B lookup(const int8_t* codebook, B index) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codebook));
    return _mm512_xor_si512(_mm512_shuffle_epi8(table, index), _mm512_set1_epi8(char(0x80)));
  }

  static void store_bytes(uint8_t* p, B a) { _mm512_storeu_si512(p, a); }

  static X splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
  template <int zero> static I dot_start(I activation_sum) {
    if (zero == 0) return _mm512_setzero_si512();
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(activation_sum, __builtin_ctz(zero | 1 << 30)));
  }
  template <int zero> static I dot(I acc, B w, X four) { return _mm512_dpbusd_epi32(acc, w, four); }

  static F even_bf16(B a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
  static F odd_bf16(B a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xffff0000))));
  }
  static F dot_bf16(F acc, B a, X b) {
    return fma(even_bf16(a), even_bf16(b), fma(odd_bf16(a), odd_bf16(b), acc));
  }
  static __m256i round_to_bf16(F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i high = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, splat_int(0x7fc0)));
  }
  static void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, round_to_bf16(a)); }
  static B to_bf16(F a, F b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(round_to_bf16(a)), round_to_bf16(b), 1);
  }

 private:
  struct Sum {
    static __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static __m256 of(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
    static __m128 of(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
  };
  struct Max {
    static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
    static __m256 of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
    static __m128 of(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
  };
  // The lanes of each of four combined into one.
  template <class Op> static __m128 across(const F* a) {
    const __m512 x = Op::of(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 y = Op::of(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512 s16 = Op::of(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    const __m256 s8 = Op::of(_mm512_castps512_ps256(s16), _mm512_extractf32x8_ps(s16, 1));
    return Op::of(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  }
};

}  // namespace tael
