// Simd over two ymm registers (AVX2, FMA, F16C). See portable.hpp for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tael {

struct Avx2 {
  static constexpr const char* kName = "avx2";
  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  using B = I;
  using X = __m256i;

  // Of 16 registers, two to each accumulator.
  static constexpr int kPanelTiles = 1, kPanelTokens = 3, kTileTokens = 2, kTilePacks = 1;
  static constexpr bool kIdleUnits = false;  // beside dot products
  static constexpr int kAttentionRows = 2;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
  static F load_f16(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
  }
  static F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static F load_bf16_even(const uint16_t* p) {
    return as_float(shl_int<16>(load_bytes((const uint8_t*)p)));
  }
  static F load_bf16_odd(const uint16_t* p) {
    return as_float(and_int(load_bytes((const uint8_t*)p), int(0xffff0000)));
  }
  static F splat_bf16_pair(const uint16_t* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    const __m256i both = _mm256_set1_epi32(pair);
    const __m256 x = _mm256_castsi256_ps(_mm256_blend_epi32(
        _mm256_slli_epi32(both, 16), _mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))), 0xaa));
    return {x, x};
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F select_range(int first, int last, F x, F y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto pick = [&](int offset, __m256 in, __m256 out) {
      const __m256i i = _mm256_add_epi32(lane, _mm256_set1_epi32(offset));
      const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(i, _mm256_set1_epi32(first - 1)),
                                              _mm256_cmpgt_epi32(_mm256_set1_epi32(last), i));
      return _mm256_blendv_ps(out, in, _mm256_castsi256_ps(inside));
    };
    return {pick(0, x.a, y.a), pick(8, x.b, y.b)};
  }
  static float sum(F x) {
    const __m256 s8 = _mm256_add_ps(x.a, x.b);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
  }
  static float largest_sum(const F* x) {
    const __m128 s4 = across<Sum>(x);
    const __m128 m2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
  }
  static void store_sums(float* p, const F* x) { _mm_storeu_ps(p, across<Sum>(x)); }
  static void store_maxima(float* p, const F* x) { _mm_storeu_ps(p, across<Max>(x)); }
  static float max_lane(F x) {
    const __m256 m8 = _mm256_max_ps(x.a, x.b);
    const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
  }
  static uint32_t at_least(F x, F y) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ));
    return uint32_t(low | _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)) << 8);
  }
  static F from_int(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static F nearest(F x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
  }
  static F scale_exponent(F x, F n) {
    const auto power = [](__m256 e) {
      const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(e), _mm256_set1_epi32(127));
      return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))};
  }
  static F zero_below(F x, F y, float limit) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_andnot_ps(_mm256_cmp_ps(y.a, l, _CMP_LT_OQ), x.a),
            _mm256_andnot_ps(_mm256_cmp_ps(y.b, l, _CMP_LT_OQ), x.b)};
  }

  static I splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I mul_int(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
  static I load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  }
  static I load_s8(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  }
  static I and_int(I x, int32_t mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  static I or_int(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int n> static I shl_int(I x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
  template <int n> static I shr_int(I x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
  static void store_rounded_s8(int8_t* p, F x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered),
                                                  _mm256_extracti128_si256(ordered, 1)));
  }
  static int32_t sum_s8(const int8_t* p) {
    int32_t s = 0;
    for (int i = 0; i < 16; ++i) s += p[i];
    return s;
  }

  static B load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
  }
  static void store_bytes(uint8_t* p, B x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 32), x.b);
  }
  template <class Fn> static B both(B x, Fn fn) { return {fn(x.a), fn(x.b)}; }
  static __m256i and_byte(__m256i x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi8(char(mask))); }
  static B low_nibbles(B x) { return both(x, [](__m256i v) { return and_byte(v, 15); }); }
  static B high_nibbles(B x) {
    return both(x, [](__m256i v) { return and_byte(_mm256_srli_epi16(v, 4), 15); });
  }
  template <int from, int to> static __m256i move_bits(__m256i plane, int mask) {
    const __m256i moved = from >= to ? _mm256_srli_epi16(plane, from >= to ? from - to : 0)
                                     : _mm256_slli_epi16(plane, from >= to ? 0 : to - from);
    return and_byte(moved, mask << to);
  }
  template <int from, int to> static B or_bit(B x, B plane) {
    return {_mm256_or_si256(x.a, move_bits<from, to>(plane.a, 1)),
            _mm256_or_si256(x.b, move_bits<from, to>(plane.b, 1))};
  }
  template <int from, int to> static B or_bits2(B x, B plane) {
    return {_mm256_or_si256(x.a, move_bits<from, to>(plane.a, 3)),
            _mm256_or_si256(x.b, move_bits<from, to>(plane.b, 3))};
  }
  static B zero_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static B lookup(const int8_t* codebook, B index) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)codebook));
    return both(index, [&](__m256i i) {
      return _mm256_xor_si256(_mm256_shuffle_epi8(table, i), _mm256_set1_epi8(char(0x80)));
    });
  }

  // maddubs adds two products in 16 bits, which holds for values up to 127. Eight-bit values
  // (zero point 128) are made signed first, |w| <= 128: 2 * 128 * 127 still fits.
  static X splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  template <int zero> static I dot_start(I activation_sum) {
    if (zero == 0 || zero == 128) return splat_int(0);
    return mul_int(activation_sum, splat_int(-zero));
  }
  template <int zero> static I dot(I acc, B w, X xs) {
    const auto add = [&](__m256i sum, __m256i v) {
      __m256i pairs;
      if (zero == 128) {
        const __m256i s = _mm256_xor_si256(v, _mm256_set1_epi8(char(0x80)));
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(xs, s));
      } else {
        pairs = _mm256_maddubs_epi16(v, xs);
      }
      return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    };
    return {add(acc.a, w.a), add(acc.b, w.b)};
  }

  static F dot_bf16(F acc, B a, B b) {
    return fma(as_float(shl_int<16>(a)), as_float(shl_int<16>(b)), fma(odd_bf16(a), odd_bf16(b), acc));
  }
  static F dot_bf16(F acc, B a, X b) { return dot_bf16(acc, a, B{b, b}); }
  static F odd_bf16(B a) { return as_float(and_int(a, int(0xffff0000))); }
  static __m256i round_to_bf16(F x) {
    const auto round = [](__m256 v) {
      const __m256i bits = _mm256_castps_si256(v);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
      return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    };
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round(x.a), round(x.b)), 0xd8);
  }
  static void store_bf16(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, round_to_bf16(x)); }
  static B to_bf16(F x, F y) { return {round_to_bf16(x), round_to_bf16(y)}; }

 private:
  struct Sum {
    static __m256 of(__m256 x, __m256 y) { return _mm256_add_ps(x, y); }
    static __m128 of(__m128 x, __m128 y) { return _mm_add_ps(x, y); }
  };
  struct Max {
    static __m256 of(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
    static __m128 of(__m128 x, __m128 y) { return _mm_max_ps(x, y); }
  };
  // The lanes of each of four combined into one.
  template <class Op> static __m128 across(const F* x) {
    const auto halves = [](__m256 a, __m256 b, __m256 c, __m256 d) {
      const __m256 ab = Op::of(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
      const __m256 cd = Op::of(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
      return Op::of(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    };
    const __m256 s8 =
        Op::of(halves(x[0].a, x[1].a, x[2].a, x[3].a), halves(x[0].b, x[1].b, x[2].b, x[3].b));
    return Op::of(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  }
};

}  // namespace tael
