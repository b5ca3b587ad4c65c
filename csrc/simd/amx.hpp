// Avx512BF16 with matrix products in tiles of 16 x 64 bytes (AMX; Intel Instruction Set Extensions Programming
// Reference, TDPBF16PS and TDPBSSD).
#pragma once

#include "simd/avx512_bf16.hpp"
#include "simd/tile_shapes.hpp"

namespace tael {

struct Amx : Avx512BF16 {
  static constexpr const char* kName = "amx";
  static constexpr int kWidePack = 16;  // tokens

 private:
  // What tiles are loaded from has been stored by then: GCC's intrinsics do not say that they read memory.
  static void finish_stores() { asm volatile("" ::: "memory"); }

 public:
  // Of one step, and what of B will be needed in its place later; null: nothing.
  struct TileStep {
    const uint16_t *a, *b, *next_b;
  };

  // Products of bf16, as long as it lives, of that many rows and 16 or 32 columns:
  //
  //     C [rows][columns] = sum over steps of A [rows][32] * B [16 pairs][columns][2]        rows <= 32
  //
  // A step adds to each element the sum of 16 even products and that of 16 odd ones, so a row does not depend on
  // the others, nor does a column. Subnormal numbers are taken for zero.
  template <int columns> class Tiles {
    static_assert(columns == 16 || columns == 32);

   public:
    static constexpr int kRows = 32;

    explicit Tiles(int num_rows) : is_wide_(num_rows > 16) {
      TileShapes shapes;
      const int upper = is_wide_ ? 16 : num_rows;
      for (const int tile : {0, 1, 4}) shapes.rows[tile] = uint8_t(upper);
      for (const int tile : {2, 3, 5}) shapes.rows[tile] = uint8_t(is_wide_ ? num_rows - 16 : 1);
      shapes.load();
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Strides, in elements, are of rows of A and C and of pairs of B; `right` is from columns 0 to 15 of B to the
    // others, if there are more.
    template <class Step>
    void multiply(int num_steps, Step&& step, int64_t a_stride, int64_t b_stride, int64_t right, float* c,
                  int64_t c_stride) const {
      if (is_wide_)
        multiply<true>(num_steps, step, a_stride, b_stride, right, c, c_stride);
      else
        multiply<false>(num_steps, step, a_stride, b_stride, right, c, c_stride);
    }

   private:
    // Tiles 0 and 1 are the upper rows of C, 2 and 3 the lower; 4 and 5 are A, 6 and 7 are B.
    template <bool is_wide, class Step>
    static void multiply(int num_steps, Step& step, int64_t a_stride, int64_t b_stride, int64_t right, float* c,
                         int64_t c_stride) {
      constexpr bool has_right = columns == 32;
      finish_stores();
      _tile_zero(0);
      if constexpr (has_right) _tile_zero(1);
      if constexpr (is_wide) _tile_zero(2);
      if constexpr (is_wide && has_right) _tile_zero(3);
      for (int i = 0; i < num_steps; ++i) {
        const TileStep s = step(i);
        if (s.next_b)
          for (int pair = 0; pair < 16; ++pair) {
            __builtin_prefetch(s.next_b + pair * b_stride, 0, 2);
            if constexpr (has_right) __builtin_prefetch(s.next_b + pair * b_stride + right, 0, 2);
          }
        _tile_loadd(6, s.b, 2 * b_stride);
        _tile_loadd(4, s.a, 2 * a_stride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (has_right) {
          _tile_loadd(7, s.b + right, 2 * b_stride);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (is_wide) {
          _tile_loadd(5, s.a + 16 * a_stride, 2 * a_stride);
          _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (is_wide && has_right) _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, 4 * c_stride);
      if constexpr (has_right) _tile_stored(1, c + 16, 4 * c_stride);
      if constexpr (is_wide) _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
      if constexpr (is_wide && has_right) _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
    }

    const bool is_wide_;
  };

  static I load_int(const int32_t* p) { return _mm512_load_si512(p); }
  // Of bytes, whatever their sign.
  static B sub_bytes(B a, int x) { return _mm512_sub_epi8(a, _mm512_set1_epi8(char(x))); }

  // Products of int8, as long as it lives, of a pack of kRows tokens with two groups of weights:
  //
  //     C [2][kRows][16] = A [kRows][32], of which `columns` are taken, * B [2][columns / 4][16 rows][4]
  template <int columns> class ByteTiles {
   public:
    static constexpr int kRows = kWidePack;
    static constexpr int64_t kProduct = 2 * kRows * 16;

    ByteTiles() {
      TileShapes shapes;
      for (int tile = 0; tile < 6; ++tile) shapes.rows[tile] = kRows;
      for (const int tile : {4, 5}) shapes.row_bytes[tile] = columns;
      for (const int tile : {6, 7}) shapes.rows[tile] = columns / 4;
      shapes.load();
      finish_stores();
    }
    ~ByteTiles() { _tile_release(); }
    ByteTiles(const ByteTiles&) = delete;
    ByteTiles& operator=(const ByteTiles&) = delete;

    struct Operands {
      const int8_t *a, *b[2];
    };
    // `count` products, operands(i) of the i-th, side by side. Two are under way at a time: a tile is stored while the
    // next is computed.
    template <class Fn> void multiply(int count, Fn&& operands, int32_t* c) const {
      for (int i = 0; i < count; i += 2) {
        const Operands first = operands(i);
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(4, first.a, 32);
        _tile_loadd(6, first.b[0], 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, first.b[1], 64);
        _tile_dpbssd(1, 4, 7);
        if (i > 0) store_second(c + (i - 1) * kProduct);
        if (i + 1 < count) {
          const Operands second = operands(i + 1);
          _tile_zero(2);
          _tile_zero(3);
          _tile_loadd(5, second.a, 32);
          _tile_loadd(6, second.b[0], 64);
          _tile_dpbssd(2, 5, 6);
          _tile_loadd(7, second.b[1], 64);
          _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, c + i * kProduct, 64);
        _tile_stored(1, c + i * kProduct + kProduct / 2, 64);
      }
      if (count % 2 == 0) store_second(c + (count - 1) * kProduct);
    }

   private:
    static void store_second(int32_t* c) {
      _tile_stored(2, c, 64);
      _tile_stored(3, c + kProduct / 2, 64);
    }
  };
};

}  // namespace tael
