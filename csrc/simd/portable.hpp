// The Simd type: 16 float lanes, 16 int32 lanes, 64 bytes. Kernels are templates over it; this
// one is plain C++ and defines what the others must compute.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.hpp"

namespace tael {

struct Portable {
  static constexpr const char* kName = "portable";
  struct F { float v[16]; };
  struct I { int32_t v[16]; };
  struct B { uint8_t v[64]; };
  struct X { int8_t v[4]; };

  // Shape of the matmul kernels: tiles and tokens of the innermost loop over unpacked weights, and
  // tokens where a tile is unpacked on the way, which is faster up to this number of packs.
  static constexpr int kPanelTiles = 1, kPanelTokens = 2, kTileTokens = 2, kTilePacks = 1;
  static constexpr bool kIdleUnits = false;  // beside dot products
  static constexpr int kAttentionRows = 2;  // that share what is read of K and V

  template <class Fn> static F map(Fn fn) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
    return r;
  }
  template <class Fn> static I map_i(Fn fn) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
    return r;
  }
  template <class Fn> static B map_b(Fn fn) {
    B r;
    for (int i = 0; i < 64; ++i) r.v[i] = uint8_t(fn(i));
    return r;
  }

  static F zero() { return splat(0.0f); }
  static F splat(float x) { return map([&](int) { return x; }); }
  static F load(const float* p) { F r; memcpy(&r, p, sizeof r); return r; }
  static void store(float* p, F a) { memcpy(p, &a, sizeof a); }
  static F load_f16(const uint8_t* p) {
    uint16_t h[16];
    memcpy(h, p, sizeof h);
    return map([&](int i) { return half_to_float(h[i]); });
  }
  // 16 pairs of bf16: the first of each pair, the second of each pair.
  static F load_bf16_even(const uint16_t* p) { return map([&](int i) { return bf16_to_float(p[2 * i]); }); }
  static F load_bf16_odd(const uint16_t* p) { return map([&](int i) { return bf16_to_float(p[2 * i + 1]); }); }
  // Even lanes p[0], odd lanes p[1].
  static F splat_bf16_pair(const uint16_t* p) { return map([&](int i) { return bf16_to_float(p[i % 2]); }); }
  static F add(F a, F b) { return map([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(F a, F b) { return map([&](int i) { return a.v[i] - b.v[i]; }); }
  static F mul(F a, F b) { return map([&](int i) { return a.v[i] * b.v[i]; }); }
  static F div(F a, F b) { return map([&](int i) { return a.v[i] / b.v[i]; }); }
  static F max(F a, F b) { return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static F min(F a, F b) { return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static F abs(F a) { return map([&](int i) { return std::fabs(a.v[i]); }); }
  // a * b + c, fused where the instruction set fuses.
  static F fma(F a, F b, F c) { return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  // Lanes first <= i < last from a, the others from b.
  static F select_range(int first, int last, F a, F b) {
    return map([&](int i) { return i >= first && i < last ? a.v[i] : b.v[i]; });
  }
  // Pairwise, in the order in which a register is halved.
  static float sum(F a) {
    for (int n = 8; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) a.v[i] = a.v[i] + a.v[i + n];
    return a.v[0];
  }
  // Of the lanes of each of four, which are added up side by side.
  static void store_sums(float* p, const F* a) {
    for (int k = 0; k < 4; ++k) {
      float parts[4];
      for (int i = 0; i < 4; ++i)
        parts[i] = (a[k].v[4 * i] + a[k].v[4 * i + 2]) + (a[k].v[4 * i + 1] + a[k].v[4 * i + 3]);
      p[k] = (parts[0] + parts[2]) + (parts[1] + parts[3]);
    }
  }
  static void store_maxima(float* p, const F* a) {
    for (int k = 0; k < 4; ++k) p[k] = max_lane(a[k]);
  }
  static float largest_sum(const F* a) {
    float sums[4];
    store_sums(sums, a);
    const float x = sums[0] > sums[2] ? sums[0] : sums[2], y = sums[1] > sums[3] ? sums[1] : sums[3];
    return x > y ? x : y;
  }
  static float max_lane(F a) {
    float m = a.v[0];
    for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
  // Bit i: a[i] >= b[i].
  static uint32_t at_least(F a, F b) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= uint32_t(a.v[i] >= b.v[i]) << i;
    return bits;
  }
  static F from_int(I a) { return map([&](int i) { return float(a.v[i]); }); }
  // Nearest whole number, ties to even, |a| < 2^22: adding 1.5 * 2^23 rounds.
  static F nearest(F a) { return map([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; }); }
  // Multiplies by 2^n; n is a whole number held in float, both results normal.
  static F scale_exponent(F a, F n) {
    return map([&](int i) { return a.v[i] * bits_to_float(uint32_t(int(n.v[i]) + 127) << 23); });
  }
  static F zero_below(F a, F x, float limit) {
    return map([&](int i) { return x.v[i] < limit ? 0.0f : a.v[i]; });
  }

  static I splat_int(int32_t x) { return map_i([&](int) { return x; }); }
  static I add_int(I a, I b) { return map_i([&](int i) { return a.v[i] + b.v[i]; }); }
  static I mul_int(I a, I b) { return map_i([&](int i) { return a.v[i] * b.v[i]; }); }
  static I load_u8(const uint8_t* p) { return map_i([&](int i) { return int32_t(p[i]); }); }
  static I load_s8(const uint8_t* p) { return map_i([&](int i) { return int32_t(int8_t(p[i])); }); }
  static I and_int(I a, int32_t mask) { return map_i([&](int i) { return a.v[i] & mask; }); }
  static I or_int(I a, I b) { return map_i([&](int i) { return a.v[i] | b.v[i]; }); }
  template <int n> static I shl_int(I a) { return map_i([&](int i) { return a.v[i] << n; }); }
  template <int n> static I shr_int(I a) { return map_i([&](int i) { return a.v[i] >> n; }); }
  // Nearest integers, ties to even, |a| < 2^22, to 16 int8: the low byte of 1.5 * 2^23 + a.
  static void store_rounded_s8(int8_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(float_to_bits(a.v[i] + 12582912.0f));
  }
  static int32_t sum_s8(const int8_t* p) {
    int32_t s = 0;
    for (int i = 0; i < 16; ++i) s += p[i];
    return s;
  }

  static B load_bytes(const uint8_t* p) { B r; memcpy(&r, p, sizeof r); return r; }
  static void store_bytes(uint8_t* p, B a) { memcpy(p, &a, sizeof a); }
  static B low_nibbles(B a) { return map_b([&](int i) { return a.v[i] & 15; }); }
  static B high_nibbles(B a) { return map_b([&](int i) { return a.v[i] >> 4; }); }
  // a | (bit `from` of plane) << to
  template <int from, int to> static B or_bit(B a, B plane) {
    return map_b([&](int i) { return a.v[i] | ((plane.v[i] >> from & 1) << to); });
  }
  // a | (bits from, from + 1 of plane) << to
  template <int from, int to> static B or_bits2(B a, B plane) {
    return map_b([&](int i) { return a.v[i] | ((plane.v[i] >> from & 3) << to); });
  }
  static B zero_bytes() { return map_b([](int) { return 0; }); }
  // codebook[index] + 128
  static B lookup(const int8_t* codebook, B index) {
    return map_b([&](int i) { return codebook[index.v[i]] + 128; });
  }

  // Four activations for all rows.
  static X splat_four(const int8_t* x) { X r; memcpy(&r, x, 4); return r; }
  // Dot products of (unsigned value - zero) with signed activations, over 4 columns of 16 rows:
  // start with dot_start(sum of the activations), then add vectors with dot.
  template <int zero> static I dot_start(I activation_sum) { return mul_int(activation_sum, splat_int(-zero)); }
  template <int zero> static I dot(I acc, B w, X x) {
    return map_i([&](int i) {
      int32_t s = acc.v[i];
      for (int k = 0; k < 4; ++k) s += int32_t(w.v[4 * i + k]) * x.v[k];
      return s;
    });
  }

  // acc + a0 b0 + a1 b1 over pairs of bf16.
  static F dot_bf16(F acc, B a, B b) {
    uint16_t x[32], y[32];
    memcpy(x, &a, sizeof a);
    memcpy(y, &b, sizeof b);
    return map([&](int i) {
      const float odd = bf16_to_float(x[2 * i + 1]) * bf16_to_float(y[2 * i + 1]) + acc.v[i];
      return bf16_to_float(x[2 * i]) * bf16_to_float(y[2 * i]) + odd;
    });
  }
  // The same with one pair for all lanes.
  static F dot_bf16(F acc, B a, X b) {
    B pairs;
    for (int i = 0; i < 16; ++i) memcpy(pairs.v + 4 * i, &b, sizeof b);
    return dot_bf16(acc, a, pairs);
  }
  static void store_bf16(uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
  }
  // The 16 values of a, then those of b.
  static B to_bf16(F a, F b) {
    uint16_t both[32];
    store_bf16(both, a);
    store_bf16(both + 16, b);
    return load_bytes((const uint8_t*)both);
  }
};

}  // namespace tael
