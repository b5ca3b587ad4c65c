// GGUF block formats (llama.cpp, ggml-quants) to tiles. Plain C++: it runs once a model.
#include <algorithm>
#include <cstring>

#include "quant/formats.hpp"

namespace tael {
namespace {

// Four columns of one row are four bytes of a plane: values are moved as such words. A mask keeps
// what a shift brings over from the byte beside it.
constexpr uint32_t kNibbleMask = 0x0f0f0f0f, kBits2Mask = 0x03030303, kBit1Mask = 0x01010101;

uint32_t load32(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

void or32(uint8_t* p, uint32_t v) {
  v |= load32(p);
  memcpy(p, &v, 4);
}

void copy16(uint8_t* p, const uint8_t* s) { memcpy(p, s, 2); }

// Writes one row's values into the zeroed planes of a group (see formats.hpp).
struct GroupPlanes {
  uint8_t* nibbles = nullptr;
  uint8_t* bits2 = nullptr;
  uint8_t* bits1 = nullptr;

  // Four values, one a byte: nibble (or low two bits, where there is no nibble plane), then the
  // higher planes.
  void put(int row, int step, uint32_t values) const {
    if (nibbles) {
      or32(nibbles + step % 4 * 64 + row * 4, (values & kNibbleMask) << (step < 4 ? 0 : 4));
      values = values >> 4 & kNibbleMask;
    }
    if (bits2) {
      or32(bits2 + step / 4 * 64 + row * 4, (values & kBits2Mask) << step % 4 * 2);
      values = values >> 2 & kBits2Mask;
    }
    if (bits1) or32(bits1 + row * 4, (values & kBit1Mask) << step);
  }
};

// Nibbles as the formats of 32 columns a block store them: byte c has column c in its low and
// column c + 16 in its high half.
uint32_t nibbles32(const uint8_t* q, int step) {
  return load32(q + step % 4 * 4) >> (step < 4 ? 0 : 4) & kNibbleMask;
}

// Bits 4 * step to 4 * step + 3, each in a byte of its own: the product has bit i at 8 * i.
uint32_t bits32(uint32_t bits, int step) { return (bits >> 4 * step & 15) * 0x00204081 & kBit1Mask; }

// Six-bit value of vector i, lane row, into vectors packed by fours.
void put_six_bits(uint8_t* packed, int i, int row, int value) {
  uint8_t* p = packed + i / 4 * 48 + row;
  if (i % 4 < 3) {
    p[i % 4 * 16] |= uint8_t(value);
    return;
  }
  p[0] |= uint8_t((value & 3) << 6);
  p[16] |= uint8_t((value >> 2 & 3) << 6);
  p[32] |= uint8_t((value >> 4) << 6);
}

// Scale (is_minimum false) or minimum j of a Q4_K or Q5_K block, from its 12 packed bytes.
int k_scale(const uint8_t* packed, int j, bool is_minimum) {
  if (j < 4) return packed[j + (is_minimum ? 4 : 0)] & 63;
  const int low = is_minimum ? packed[j + 4] >> 4 : packed[j + 4] & 15;
  return low | (packed[j - 4 + (is_minimum ? 4 : 0)] >> 6) << 4;
}

// Puts one source block of one row into its zeroed tile block.
void put_block(Format format, const uint8_t* s, int row, uint8_t* t) {
  switch (format) {
    case Format::F32: memcpy(t + row * 4, s, 4); return;
    case Format::F16: memcpy(t + row * 2, s, 2); return;
    case Format::Q4_0:
    case Format::IQ4_NL: {
      for (int step = 0; step < 8; ++step) GroupPlanes{t}.put(row, step, nibbles32(s + 2, step));
      copy16(t + 256 + row * 2, s);
      return;
    }
    case Format::MXFP4: {
      for (int step = 0; step < 8; ++step) GroupPlanes{t}.put(row, step, nibbles32(s + 1, step));
      t[256 + row] = s[0];
      return;
    }
    case Format::Q4_1: {
      for (int step = 0; step < 8; ++step) GroupPlanes{t}.put(row, step, nibbles32(s + 4, step));
      copy16(t + 256 + row * 2, s);
      copy16(t + 288 + row * 2, s + 2);
      return;
    }
    case Format::Q5_0:
    case Format::Q5_1: {
      const int header = format == Format::Q5_0 ? 2 : 4;
      const uint32_t high = load32(s + header);
      for (int step = 0; step < 8; ++step)
        GroupPlanes{t, nullptr, t + 256}.put(row, step, nibbles32(s + header + 4, step) | bits32(high, step) << 4);
      copy16(t + 320 + row * 2, s);
      if (format == Format::Q5_1) copy16(t + 352 + row * 2, s + 2);
      return;
    }
    case Format::Q8_0: {
      for (int step = 0; step < 8; ++step) or32(t + step * 64 + row * 4, load32(s + 2 + step * 4) ^ 0x80808080);
      copy16(t + 512 + row * 2, s);
      return;
    }
    case Format::Q4_K:
    case Format::Q5_K: {
      const bool five = format == Format::Q5_K;
      const uint8_t *high = s + 16, *low = s + (five ? 48 : 16);
      uint8_t* bits1 = t + 2048;
      for (int sub = 0; sub < 8; ++sub) {
        const GroupPlanes planes{t + sub * 256, nullptr, five ? bits1 + sub * 64 : nullptr};
        for (int step = 0; step < 8; ++step) {
          uint32_t values = load32(low + sub / 2 * 32 + step * 4) >> sub % 2 * 4 & kNibbleMask;
          if (five) values |= (load32(high + step * 4) >> sub & kBit1Mask) << 4;
          planes.put(row, step, values);
        }
      }
      uint8_t* scales = t + (five ? 2560 : 2048);
      for (int j = 0; j < 8; ++j) {
        put_six_bits(scales, j, row, k_scale(s + 4, j, false));
        put_six_bits(scales, 8 + j, row, k_scale(s + 4, j, true));
      }
      copy16(scales + 192 + row * 2, s);
      copy16(scales + 224 + row * 2, s + 2);
      return;
    }
    case Format::Q6_K: {
      for (int group = 0; group < 8; ++group) {
        const int half = group / 4, quarter = group % 4;
        const uint8_t *low = s + half * 64 + quarter % 2 * 32, *high = s + 128 + half * 32;
        const GroupPlanes planes{t + group * 256, t + 2048 + group * 128};
        for (int step = 0; step < 8; ++step)
          planes.put(row, step, (load32(low + step * 4) >> quarter / 2 * 4 & kNibbleMask) |
                                    (load32(high + step * 4) >> quarter * 2 & kBits2Mask) << 4);
      }
      for (int j = 0; j < 16; ++j) t[3072 + j * 16 + row] = s[192 + j];
      copy16(t + 3328 + row * 2, s + 208);
      return;
    }
    case Format::Q3_K: {
      for (int group = 0; group < 8; ++group) {
        const uint8_t* low = s + 32 + group / 4 * 32;
        const GroupPlanes planes{nullptr, t + group * 128, t + 1024 + group * 64};
        for (int step = 0; step < 8; ++step)
          planes.put(row, step, (load32(low + step * 4) >> group % 4 * 2 & kBits2Mask) |
                                    (load32(s + step * 4) >> group & kBit1Mask) << 2);
      }
      const uint8_t* packed = s + 96;
      for (int j = 0; j < 16; ++j) {
        const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
        put_six_bits(t + 1536, j, row, low | (packed[8 + j % 4] >> j / 4 * 2 & 3) << 4);
      }
      copy16(t + 1728 + row * 2, s + 108);
      return;
    }
    case Format::Q2_K: {
      for (int group = 0; group < 8; ++group) {
        const uint8_t* low = s + 16 + group / 4 * 32;
        for (int step = 0; step < 8; ++step)
          GroupPlanes{nullptr, t + group * 128}.put(row, step, load32(low + step * 4) >> group % 4 * 2 & kBits2Mask);
      }
      for (int j = 0; j < 16; ++j) t[1024 + j * 16 + row] = s[j];
      copy16(t + 1280 + row * 2, s + 80);
      copy16(t + 1312 + row * 2, s + 82);
      return;
    }
    case Format::BF16: return;  // pairs of columns: repack() places them
  }
}

}  // namespace

// Block by block over all rows of a tile, so that the block that is written stays in cache.
void repack(Format format, const uint8_t* source, int64_t num_rows, int64_t columns, uint8_t* tiles) {
  const FormatInfo& info = kFormats[int(format)];
  const int64_t blocks = columns / info.block_columns;
  const int64_t row_bytes = blocks * info.block_bytes;
  const int64_t stride = tile_bytes(format, columns);
  for (int64_t first = 0; first < num_rows; first += kTileRows, tiles += stride) {
    memset(tiles, 0, stride);
    const int rows = int(std::min<int64_t>(kTileRows, num_rows - first));
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* s = source + first * row_bytes + b * info.block_bytes;
      for (int row = 0; row < rows; ++row, s += row_bytes) {
        if (format == Format::BF16)
          memcpy(tiles + (b / 2 * kTileRows + row) * 4 + b % 2 * 2, s, 2);
        else
          put_block(format, s, row, tiles + b * info.block_bytes * kTileRows);
      }
    }
  }
}

}  // namespace tael
