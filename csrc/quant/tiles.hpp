// How to read each quantised format's blocks from a tile (layout: formats.hpp). A kernel opens a
// block, which decodes what its groups share, then walks its groups of 32 columns. A group has
// one scale, or one for each half (kSub == 16):
//
//     value(row, column) = scale(group, part) * (q - kZero)                   kZero >= 0
//     value(row, column) = scale(group, part) * q + minimum(group, part)      kHasMin, kZero == 0
//
// q is an unsigned byte of values<step>(group), which is columns 4 * step to 4 * step + 3. Where these take
// one or two instructions (kCheapValues), packed_values<step>(block, group) has them without the block being open.
#pragma once

#include "common/half.hpp"
#include "common/unrolled.hpp"
#include "quant/formats.hpp"

namespace tael::tiles {

constexpr int kNibbles = 256, kBits2 = 128, kBits1 = 64, kBytes = 512;  // planes of one group

template <class S, int step> typename S::B nibble_step(const uint8_t* group) {
  const typename S::B v = S::load_bytes(group + step % 4 * 64);
  return step < 4 ? S::low_nibbles(v) : S::high_nibbles(v);
}

template <class S, int step> typename S::B or_bits2_step(typename S::B v, const uint8_t* group, bool high) {
  const typename S::B plane = S::load_bytes(group + step / 4 * 64);
  return high ? S::template or_bits2<step % 4 * 2, 4>(v, plane)
              : S::template or_bits2<step % 4 * 2, 0>(v, plane);
}

// Vector i of the 6-bit vectors packed by fours into 48 bytes.
template <class S> inline __attribute__((always_inline)) typename S::I load_six_bits(const uint8_t* packed, int i) {
  const uint8_t* p = packed + i / 4 * 48;
  if (i % 4 < 3) return S::and_int(S::load_u8(p + i % 4 * 16), 63);
  const typename S::I low = S::template shr_int<6>(S::load_u8(p));
  const typename S::I middle = S::template shr_int<6>(S::load_u8(p + 16));
  const typename S::I high = S::template shr_int<6>(S::load_u8(p + 32));
  return S::or_int(low, S::or_int(S::template shl_int<2>(middle), S::template shl_int<4>(high)));
}

template <class S> typename S::F load_e8m0_half(const uint8_t* p) {
  float scale[16];
  for (int r = 0; r < 16; ++r) scale[r] = e8m0_half_to_float(p[r]);
  return S::load(scale);
}

// Formats of 32 columns a block: planes, then d, then (kHasMin) m.
template <class S, int planes, int zero, bool has_min> struct Simple {
  static constexpr int kGroups = 1, kSub = 32, kZero = zero;
  static constexpr bool kHasMin = has_min, kCheapValues = false;
  static constexpr int kBlockBytes = planes + 32 + (has_min ? 32 : 0);
  const uint8_t* block;
  typename S::F d, m;
  explicit Simple(const uint8_t* p) : block(p), d(S::load_f16(p + planes)) {
    if constexpr (has_min) m = S::load_f16(p + planes + 32);
  }
  typename S::F scale(int, int) const { return d; }
  typename S::F minimum(int, int) const { return m; }
};

template <class S, int zero, bool has_min> struct FourBit : Simple<S, kNibbles, zero, has_min> {
  using Simple<S, kNibbles, zero, has_min>::Simple;
  static constexpr bool kCheapValues = true;
  template <int step> static typename S::B packed_values(const uint8_t* block, int) {
    return nibble_step<S, step>(block);
  }
  template <int step> typename S::B values(int) const { return packed_values<step>(this->block, 0); }
};
template <class S> using Q4_0 = FourBit<S, 8, false>;
template <class S> using Q4_1 = FourBit<S, 0, true>;

template <class S, int zero, bool has_min>
struct FiveBit : Simple<S, kNibbles + kBits1, zero, has_min> {
  using Simple<S, kNibbles + kBits1, zero, has_min>::Simple;
  template <int step> typename S::B values(int) const {
    return S::template or_bit<step, 4>(nibble_step<S, step>(this->block),
                                       S::load_bytes(this->block + kNibbles));
  }
};
template <class S> using Q5_0 = FiveBit<S, 16, false>;
template <class S> using Q5_1 = FiveBit<S, 0, true>;

template <class S> struct Q8_0 : Simple<S, kBytes, 128, false> {
  using Simple<S, kBytes, 128, false>::Simple;
  static constexpr bool kCheapValues = true;
  template <int step> static typename S::B packed_values(const uint8_t* block, int) {
    return S::load_bytes(block + step * 64);
  }
  template <int step> typename S::B values(int) const { return packed_values<step>(this->block, 0); }
};

template <class S> struct IQ4_NL : Simple<S, kNibbles, 128, false> {
  using Simple<S, kNibbles, 128, false>::Simple;
  template <int step> typename S::B values(int) const {
    return S::lookup(kIQ4NLCodebook, nibble_step<S, step>(this->block));
  }
};

template <class S> struct MXFP4 {
  static constexpr int kGroups = 1, kSub = 32, kZero = 128, kBlockBytes = kNibbles + 16;
  static constexpr bool kHasMin = false, kCheapValues = false;
  const uint8_t* block;
  typename S::F d;
  explicit MXFP4(const uint8_t* p) : block(p), d(load_e8m0_half<S>(p + kNibbles)) {}
  typename S::F scale(int, int) const { return d; }
  template <int step> typename S::B values(int) const {
    return S::lookup(kMXFP4Codebook, nibble_step<S, step>(block));
  }
};

// Q4_K, Q5_K: planes of 8 groups, 6-bit scales and minimums, d, dmin.
template <class S, int planes> struct AffineK {
  static constexpr int kGroups = 8, kSub = 32, kZero = 0, kBlockBytes = planes + 192 + 64;
  static constexpr bool kHasMin = true, kCheapValues = false;
  const uint8_t* block;
  typename S::F scales[8], minimums[8];
  explicit AffineK(const uint8_t* p) : block(p) {
    const uint8_t* packed = p + planes;
    const typename S::F d = S::load_f16(packed + 192);
    const typename S::F dmin = S::sub(S::zero(), S::load_f16(packed + 224));
    unrolled([&](auto g) {
      scales[g] = S::mul(d, S::from_int(load_six_bits<S>(packed, g)));
      minimums[g] = S::mul(dmin, S::from_int(load_six_bits<S>(packed, 8 + g)));
    }, std::make_integer_sequence<int, 8>{});
  }
  typename S::F scale(int g, int) const { return scales[g]; }
  typename S::F minimum(int g, int) const { return minimums[g]; }
};

template <class S> struct Q4_K : AffineK<S, 8 * kNibbles> {
  using AffineK<S, 8 * kNibbles>::AffineK;
  static constexpr bool kCheapValues = true;
  template <int step> static typename S::B packed_values(const uint8_t* block, int g) {
    return nibble_step<S, step>(block + g * kNibbles);
  }
  template <int step> typename S::B values(int g) const { return packed_values<step>(this->block, g); }
};

template <class S> struct Q5_K : AffineK<S, 8 * (kNibbles + kBits1)> {
  using AffineK<S, 8 * (kNibbles + kBits1)>::AffineK;
  template <int step> typename S::B values(int g) const {
    return S::template or_bit<step, 4>(nibble_step<S, step>(this->block + g * kNibbles),
                                       S::load_bytes(this->block + 8 * kNibbles + g * kBits1));
  }
};

template <class S> struct Q6_K {
  static constexpr int kGroups = 8, kSub = 16, kZero = 32;
  static constexpr bool kHasMin = false, kCheapValues = false;
  static constexpr int kScales = 8 * (kNibbles + kBits2), kBlockBytes = kScales + 256 + 32;
  const uint8_t* block;
  typename S::F d;
  explicit Q6_K(const uint8_t* p) : block(p), d(S::load_f16(p + kScales + 256)) {}
  typename S::F scale(int g, int part) const {
    return S::mul(d, S::from_int(S::load_s8(block + kScales + (2 * g + part) * 16)));
  }
  template <int step> typename S::B values(int g) const {
    return or_bits2_step<S, step>(nibble_step<S, step>(block + g * kNibbles),
                                  block + 8 * kNibbles + g * kBits2, true);
  }
};

template <class S> struct Q3_K {
  static constexpr int kGroups = 8, kSub = 16, kZero = 4;
  static constexpr bool kHasMin = false, kCheapValues = false;
  static constexpr int kScales = 8 * (kBits2 + kBits1), kBlockBytes = kScales + 192 + 32;
  const uint8_t* block;
  typename S::F d;
  explicit Q3_K(const uint8_t* p) : block(p), d(S::load_f16(p + kScales + 192)) {}
  typename S::F scale(int g, int part) const {
    const typename S::I sub = load_six_bits<S>(block + kScales, 2 * g + part);
    return S::mul(d, S::from_int(S::add_int(sub, S::splat_int(-32))));
  }
  template <int step> typename S::B values(int g) const {
    return S::template or_bit<step, 2>(or_bits2_step<S, step>(S::zero_bytes(), block + g * kBits2, false),
                                       S::load_bytes(block + 8 * kBits2 + g * kBits1));
  }
};

template <class S> struct Q2_K {
  static constexpr int kGroups = 8, kSub = 16, kZero = 0;
  static constexpr bool kHasMin = true, kCheapValues = false;
  static constexpr int kScales = 8 * kBits2, kBlockBytes = kScales + 256 + 64;
  const uint8_t* block;
  typename S::F d, dmin;
  explicit Q2_K(const uint8_t* p)
      : block(p), d(S::load_f16(p + kScales + 256)),
        dmin(S::sub(S::zero(), S::load_f16(p + kScales + 288))) {}
  typename S::F scale(int g, int part) const {
    return S::mul(d, S::from_int(S::and_int(S::load_u8(scale_bytes(g, part)), 15)));
  }
  typename S::F minimum(int g, int part) const {
    return S::mul(dmin, S::from_int(S::template shr_int<4>(S::load_u8(scale_bytes(g, part)))));
  }
  template <int step> typename S::B values(int g) const {
    return or_bits2_step<S, step>(S::zero_bytes(), block + g * kBits2, false);
  }

 private:
  const uint8_t* scale_bytes(int g, int part) const { return block + kScales + (2 * g + part) * 16; }
};

}  // namespace tael::tiles
