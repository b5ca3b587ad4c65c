// GGUF block formats (llama.cpp, ggml-quants) to tiles. Plain C++: it runs once a model.
#include <cstring>

#include "quant/formats.hpp"

namespace tael {
namespace {

uint16_t load16(const uint8_t* p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

void store16(uint8_t* p, uint16_t v) { memcpy(p, &v, 2); }

// Writes one row's values into the planes of a group (see formats.hpp).
struct GroupPlanes {
  uint8_t* nibbles = nullptr;
  uint8_t* bits2 = nullptr;
  uint8_t* bits1 = nullptr;

  // value = nibble (or low two bits, where there is no nibble plane) plus the higher planes.
  void put(int row, int column, int value) const {
    const int step = column / 4, byte = row * 4 + column % 4;
    if (nibbles) {
      nibbles[step % 4 * 64 + byte] |= uint8_t((value & 15) << (step < 4 ? 0 : 4));
      value >>= 4;
    }
    if (bits2) {
      bits2[step / 4 * 64 + byte] |= uint8_t((value & 3) << step % 4 * 2);
      value >>= 2;
    }
    if (bits1) bits1[byte] |= uint8_t((value & 1) << step);
  }
};

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
  const auto nibble32 = [](const uint8_t* q, int c) { return c < 16 ? q[c] & 15 : q[c - 16] >> 4; };
  switch (format) {
    case Format::F32: memcpy(t + row * 4, s, 4); return;
    case Format::F16: memcpy(t + row * 2, s, 2); return;
    case Format::Q4_0:
    case Format::IQ4_NL: {
      for (int c = 0; c < 32; ++c) GroupPlanes{t}.put(row, c, nibble32(s + 2, c));
      store16(t + 256 + row * 2, load16(s));
      return;
    }
    case Format::MXFP4: {
      for (int c = 0; c < 32; ++c) GroupPlanes{t}.put(row, c, nibble32(s + 1, c));
      t[256 + row] = s[0];
      return;
    }
    case Format::Q4_1: {
      for (int c = 0; c < 32; ++c) GroupPlanes{t}.put(row, c, nibble32(s + 4, c));
      store16(t + 256 + row * 2, load16(s));
      store16(t + 288 + row * 2, load16(s + 2));
      return;
    }
    case Format::Q5_0:
    case Format::Q5_1: {
      const int header = format == Format::Q5_0 ? 2 : 4;
      uint32_t high;
      memcpy(&high, s + header, 4);
      const GroupPlanes planes{t, nullptr, t + 256};
      for (int c = 0; c < 32; ++c)
        planes.put(row, c, nibble32(s + header + 4, c) | int(high >> c & 1) << 4);
      store16(t + 320 + row * 2, load16(s));
      if (format == Format::Q5_1) store16(t + 352 + row * 2, load16(s + 2));
      return;
    }
    case Format::Q8_0: {
      for (int c = 0; c < 32; ++c) t[c / 4 * 64 + row * 4 + c % 4] = s[2 + c] ^ 0x80;
      store16(t + 512 + row * 2, load16(s));
      return;
    }
    case Format::Q4_K:
    case Format::Q5_K: {
      const bool five = format == Format::Q5_K;
      const uint8_t *high = s + 16, *low = s + (five ? 48 : 16);
      uint8_t* bits1 = t + 2048;
      for (int c = 0; c < 256; ++c) {
        const int sub = c / 32;
        const uint8_t byte = low[sub / 2 * 32 + c % 32];
        int value = sub % 2 ? byte >> 4 : byte & 15;
        if (five) value |= (high[c % 32] >> sub & 1) << 4;
        GroupPlanes{t + sub * 256, nullptr, five ? bits1 + sub * 64 : nullptr}.put(row, c % 32, value);
      }
      uint8_t* scales = t + (five ? 2560 : 2048);
      for (int j = 0; j < 8; ++j) {
        put_six_bits(scales, j, row, k_scale(s + 4, j, false));
        put_six_bits(scales, 8 + j, row, k_scale(s + 4, j, true));
      }
      store16(scales + 192 + row * 2, load16(s));
      store16(scales + 224 + row * 2, load16(s + 2));
      return;
    }
    case Format::Q6_K: {
      for (int c = 0; c < 256; ++c) {
        const int half = c / 128, quarter = c / 32 % 4, l = c % 32;
        const uint8_t byte = s[half * 64 + quarter % 2 * 32 + l];
        const int value = (quarter < 2 ? byte & 15 : byte >> 4) |
                          (s[128 + half * 32 + l] >> quarter * 2 & 3) << 4;
        GroupPlanes{t + c / 32 * 256, t + 2048 + c / 32 * 128}.put(row, l, value);
      }
      for (int j = 0; j < 16; ++j) t[3072 + j * 16 + row] = s[192 + j];
      store16(t + 3328 + row * 2, load16(s + 208));
      return;
    }
    case Format::Q3_K: {
      for (int c = 0; c < 256; ++c) {
        const int half = c / 128, quarter = c / 32 % 4, l = c % 32;
        const int value = (s[32 + half * 32 + l] >> quarter * 2 & 3) | (s[l] >> c / 32 & 1) << 2;
        GroupPlanes{nullptr, t + c / 32 * 128, t + 1024 + c / 32 * 64}.put(row, l, value);
      }
      const uint8_t* packed = s + 96;
      for (int j = 0; j < 16; ++j) {
        const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
        put_six_bits(t + 1536, j, row, low | (packed[8 + j % 4] >> j / 4 * 2 & 3) << 4);
      }
      store16(t + 1728 + row * 2, load16(s + 108));
      return;
    }
    case Format::Q2_K: {
      for (int c = 0; c < 256; ++c) {
        const int half = c / 128, quarter = c / 32 % 4, l = c % 32;
        GroupPlanes{nullptr, t + c / 32 * 128}.put(row, l, s[16 + half * 32 + l] >> quarter * 2 & 3);
      }
      for (int j = 0; j < 16; ++j) t[1024 + j * 16 + row] = s[j];
      store16(t + 1280 + row * 2, load16(s + 80));
      store16(t + 1312 + row * 2, load16(s + 82));
      return;
    }
    case Format::BF16: return;  // pairs of columns: repack() places them
  }
}

}  // namespace

void repack(Format format, const uint8_t* source, int64_t num_rows, int64_t columns, uint8_t* tiles) {
  const FormatInfo& info = kFormats[int(format)];
  const int64_t blocks = columns / info.block_columns;
  const int64_t row_bytes = blocks * info.block_bytes;
  const int64_t stride = tile_bytes(format, columns);
  memset(tiles, 0, num_tiles(num_rows) * stride);
  for (int64_t row = 0; row < num_rows; ++row) {
    uint8_t* tile = tiles + row / kTileRows * stride;
    const int lane = int(row % kTileRows);
    const uint8_t* s = source + row * row_bytes;
    for (int64_t b = 0; b < blocks; ++b, s += info.block_bytes) {
      if (format == Format::BF16)
        memcpy(tile + (b / 2 * kTileRows + lane) * 4 + b % 2 * 2, s, 2);
      else
        put_block(format, s, lane, tile + b * info.block_bytes * kTileRows);
    }
  }
}

}  // namespace tael
