// Weight formats, and the tile layout into which they are repacked.
//
// A matrix [rows, columns] becomes rows / 16 tiles; a tile holds 16 rows and is one contiguous
// stream of blocks along the columns, each as long as 16 blocks of the source format: repacking
// moves bits and adds none. Quantised values lie so that one 64-byte vector is 16 rows x 4
// columns, the operand of a 4-way int8 dot product:
//
//     byte        0     1     2     3     4     5   ...   63
//     (row, col) (0,0) (0,1) (0,2) (0,3) (1,0) (1,1) ... (15,3)
//
// Columns go in groups of 32: 8 such vectors, here called steps 0 to 7. The planes of a group:
//
//     nibbles  256 bytes: vector v has step v in its low and step v + 4 in its high nibbles
//     bits2    128 bytes: vector v has step 4v + i in bits 2i, 2i + 1
//     bits1     64 bytes: step i in bit i
//     bytes    512 bytes: vector v is step v
//
// Blocks ("x16": one per row; a block of a K format has 8 groups, all others one):
//
//     Q4_0   nibbles, d f16 x16                       Q4_1   nibbles, d, m f16 x16
//     Q5_0   nibbles, bits1, d f16 x16                Q5_1   nibbles, bits1, d, m f16 x16
//     Q8_0   bytes (value + 128), d f16 x16           IQ4_NL nibbles (codebook index), d f16 x16
//     MXFP4  nibbles (codebook index), e8m0 x16
//     Q4_K   nibbles x8, scales, mins (6 bits, packed), d, dmin f16 x16
//     Q5_K   nibbles x8, bits1 x8, scales, mins (6 bits, packed), d, dmin f16 x16
//     Q6_K   nibbles x8, bits2 x8, scales i8 [16 sub-blocks][16 rows], d f16 x16
//     Q3_K   bits2 x8, bits1 x8, scales (6 bits, packed) [16 sub-blocks][16 rows], d f16 x16
//     Q2_K   bits2 x8, scale | min << 4 [16 sub-blocks][16 rows], d, dmin f16 x16
//     F32    [columns][16 rows]    F16 [columns][16 rows]    BF16 [columns / 2][16 rows][2]
//
// Four vectors a, b, c, e of 16 six-bit values pack into three of 16 bytes:
// a | (e & 3) << 6, b | (e >> 2 & 3) << 6, c | (e >> 4) << 6.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tael {

enum class Format : int {
  F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4,
};
constexpr int kNumFormats = 15;

constexpr int kTileRows = 16;
constexpr int kGroupColumns = 32;

struct FormatInfo {
  const char* name;
  int block_columns;  // of the source format
  int block_bytes;    // of the source format, one row
};

constexpr FormatInfo kFormats[kNumFormats] = {
    {"F32", 1, 4},     {"F16", 1, 2},      {"BF16", 1, 2},     {"Q4_0", 32, 18},   {"Q4_1", 32, 20},
    {"Q5_0", 32, 22},  {"Q5_1", 32, 24},   {"Q8_0", 32, 34},   {"Q2_K", 256, 84},  {"Q3_K", 256, 110},
    {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210}, {"IQ4_NL", 32, 18}, {"MXFP4", 32, 17},
};

constexpr bool is_float(Format format) { return int(format) <= int(Format::BF16); }

// Columns as the kernels see them: activations are padded with zeros up to here.
constexpr int64_t padded_columns(int64_t columns) {
  return (columns + kGroupColumns - 1) / kGroupColumns * kGroupColumns;
}

constexpr int64_t num_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Bytes of one tile (16 rows).
constexpr int64_t tile_bytes(Format format, int64_t columns) {
  const FormatInfo& info = kFormats[int(format)];
  return padded_columns(columns) / info.block_columns * info.block_bytes * kTileRows;
}

// Values of the 4-bit codebooks. IQ4_NL: llama.cpp's non-linear levels. MXFP4: twice the E2M1
// values of the OCP microscaling specification, so that they are integers.
constexpr int8_t kIQ4NLCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                       1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t kMXFP4Codebook[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Repacks rows [first_row, first_row + num_rows) of a matrix into whole tiles. `source` holds
// num_rows rows of the source format; `tiles` receives num_tiles(num_rows) tiles. Rows missing
// in the last tile become zeros.
void repack(Format format, const uint8_t* source, int64_t num_rows, int64_t columns, uint8_t* tiles);

}  // namespace tael
