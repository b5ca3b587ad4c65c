#include "quant/dequantize.hpp"

#include "common/half.hpp"

namespace tael {
namespace {

float load_half(const uint8_t* p, int row) {
  uint16_t bits;
  memcpy(&bits, p + row * 2, 2);
  return half_to_float(bits);
}

// One row's view of the planes of a group.
struct Lane {
  int row;
  int nibble(const uint8_t* plane, int c) const {
    return plane[c / 4 % 4 * 64 + row * 4 + c % 4] >> (c < 16 ? 0 : 4) & 15;
  }
  int bits2(const uint8_t* plane, int c) const {
    return plane[c / 16 * 64 + row * 4 + c % 4] >> c / 4 % 4 * 2 & 3;
  }
  int bits1(const uint8_t* plane, int c) const { return plane[row * 4 + c % 4] >> c / 4 & 1; }
  int six_bits(const uint8_t* packed, int i) const {
    const uint8_t* p = packed + i / 4 * 48 + row;
    return i % 4 < 3 ? p[i % 4 * 16] & 63 : p[0] >> 6 | p[16] >> 6 << 2 | p[32] >> 6 << 4;
  }
};

void dequantize_block(Format format, const uint8_t* t, int row, float* out) {
  const Lane lane{row};
  switch (format) {
    case Format::F32: memcpy(out, t + row * 4, 4); return;
    case Format::F16: out[0] = load_half(t, row); return;
    case Format::Q4_0:
      for (int c = 0; c < 32; ++c) out[c] = load_half(t + 256, row) * float(lane.nibble(t, c) - 8);
      return;
    case Format::IQ4_NL:
      for (int c = 0; c < 32; ++c)
        out[c] = load_half(t + 256, row) * float(kIQ4NLCodebook[lane.nibble(t, c)]);
      return;
    case Format::MXFP4:
      for (int c = 0; c < 32; ++c)
        out[c] = e8m0_half_to_float(t[256 + row]) * float(kMXFP4Codebook[lane.nibble(t, c)]);
      return;
    case Format::Q4_1:
      for (int c = 0; c < 32; ++c)
        out[c] = load_half(t + 256, row) * float(lane.nibble(t, c)) + load_half(t + 288, row);
      return;
    case Format::Q5_0:
      for (int c = 0; c < 32; ++c)
        out[c] = load_half(t + 320, row) * float((lane.nibble(t, c) | lane.bits1(t + 256, c) << 4) - 16);
      return;
    case Format::Q5_1:
      for (int c = 0; c < 32; ++c)
        out[c] = load_half(t + 320, row) * float(lane.nibble(t, c) | lane.bits1(t + 256, c) << 4) +
                 load_half(t + 352, row);
      return;
    case Format::Q8_0:
      for (int c = 0; c < 32; ++c)
        out[c] = load_half(t + 512, row) * float(int8_t(t[c / 4 * 64 + row * 4 + c % 4] ^ 0x80));
      return;
    case Format::Q4_K:
    case Format::Q5_K: {
      const bool five = format == Format::Q5_K;
      const uint8_t* scales = t + (five ? 2560 : 2048);
      for (int g = 0; g < 8; ++g) {
        const float scale = load_half(scales + 192, row) * float(lane.six_bits(scales, g));
        const float minimum = load_half(scales + 224, row) * float(lane.six_bits(scales, 8 + g));
        for (int c = 0; c < 32; ++c) {
          int q = lane.nibble(t + g * 256, c);
          if (five) q |= lane.bits1(t + 2048 + g * 64, c) << 4;
          out[g * 32 + c] = scale * float(q) - minimum;
        }
      }
      return;
    }
    case Format::Q6_K:
      for (int c = 0; c < 256; ++c) {
        const int g = c / 32, l = c % 32;
        const int q = (lane.nibble(t + g * 256, l) | lane.bits2(t + 2048 + g * 128, l) << 4) - 32;
        const float scale = load_half(t + 3328, row) * float(int8_t(t[3072 + c / 16 * 16 + row]));
        out[c] = scale * float(q);
      }
      return;
    case Format::Q3_K:
      for (int c = 0; c < 256; ++c) {
        const int g = c / 32, l = c % 32;
        const int q = (lane.bits2(t + g * 128, l) | lane.bits1(t + 1024 + g * 64, l) << 2) - 4;
        const float scale = load_half(t + 1728, row) * float(lane.six_bits(t + 1536, c / 16) - 32);
        out[c] = scale * float(q);
      }
      return;
    case Format::Q2_K:
      for (int c = 0; c < 256; ++c) {
        const int packed = t[1024 + c / 16 * 16 + row];
        const float scale = load_half(t + 1280, row) * float(packed & 15);
        const float minimum = load_half(t + 1312, row) * float(packed >> 4);
        out[c] = scale * float(lane.bits2(t + c / 32 * 128, c % 32)) - minimum;
      }
      return;
    case Format::BF16: return;  // pairs of columns: dequantize_row() reads them
  }
}

}  // namespace

void dequantize_row(Format format, const uint8_t* tile, int row, int64_t columns, float* out) {
  const FormatInfo& info = kFormats[int(format)];
  for (int64_t c = 0; c < columns; c += info.block_columns) {
    if (format == Format::BF16) {
      uint16_t bits;
      memcpy(&bits, tile + (c / 2 * kTileRows + row) * 4 + c % 2 * 2, 2);
      out[c] = bf16_to_float(bits);
    } else {
      dequantize_block(format, tile + c / info.block_columns * info.block_bytes * kTileRows, row, out + c);
    }
  }
}

}  // namespace tael
