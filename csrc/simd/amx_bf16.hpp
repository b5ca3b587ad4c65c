// Avx512BF16 with products of bf16 matrices in tiles of 16 x 16 (AMX).
//
//     C [rows][32] = sum over steps of A [rows][32] * B [16 pairs][32 columns][2]        rows <= 32
//
// A step adds to each element the sum of 16 even products and that of 16 odd ones, so a row does not depend on the
// others. Subnormal numbers are taken for zero (Intel Instruction Set Extensions Programming Reference, TDPBF16PS).
#pragma once

#include "simd/avx512_bf16.hpp"

namespace tael {

struct AmxBF16 : Avx512BF16 {
  static constexpr const char* kName = "amx_bf16";

  // Of one step, and what of B will be needed in its place later; null: nothing.
  struct TileStep {
    const uint16_t *a, *b, *next_b;
  };

  // Tiles for products of that many rows, as long as it lives.
  class Tiles {
   public:
    static constexpr int kRows = 32;

    explicit Tiles(int num_rows) : is_wide_(num_rows > 16) {
      Shapes shapes;
      const int upper = is_wide_ ? 16 : num_rows;
      for (const int tile : {0, 1, 4}) shapes.rows[tile] = uint8_t(upper);
      for (const int tile : {2, 3, 5}) shapes.rows[tile] = uint8_t(is_wide_ ? num_rows - 16 : 1);
      asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Strides are of rows of A and C and of pairs of B, `right` is from columns 0 to 15 of B to the others: of elements all.
    template <class Step>
    void multiply(int num_steps, Step&& step, int64_t a_stride, int64_t b_stride, int64_t right, float* c,
                  int64_t c_stride) const {
      if (is_wide_)
        multiply<true>(num_steps, step, a_stride, b_stride, right, c, c_stride);
      else
        multiply<false>(num_steps, step, a_stride, b_stride, right, c, c_stride);
    }

   private:
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
    };

    // Tiles 0 and 1 are the upper rows of C, 2 and 3 the lower; 4 and 5 are A, 6 and 7 are B.
    template <bool is_wide, class Step>
    static void multiply(int num_steps, Step& step, int64_t a_stride, int64_t b_stride, int64_t right, float* c,
                         int64_t c_stride) {
      asm volatile("" ::: "memory");  // what is loaded has been stored: GCC's intrinsics do not say that they read it
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (is_wide) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int i = 0; i < num_steps; ++i) {
        const TileStep s = step(i);
        if (s.next_b)
          for (int pair = 0; pair < 16; ++pair) {
            __builtin_prefetch(s.next_b + pair * b_stride, 0, 2);
            __builtin_prefetch(s.next_b + pair * b_stride + right, 0, 2);
          }
        _tile_loadd(6, s.b, 2 * b_stride);
        _tile_loadd(4, s.a, 2 * a_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, s.b + right, 2 * b_stride);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (is_wide) {
          _tile_loadd(5, s.a + 16 * a_stride, 2 * a_stride);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c, 4 * c_stride);
      _tile_stored(1, c + 16, 4 * c_stride);
      if constexpr (is_wide) {
        _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
        _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
      }
    }

    const bool is_wide_;
  };
};

}  // namespace tael
