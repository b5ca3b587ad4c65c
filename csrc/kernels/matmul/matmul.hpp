// out[token, row] = sum over columns of weight[row, column] * x[token, column], for 16-row tiles.
//
// Every output is accumulated over groups of 32 columns in ascending order, one fused multiply-add
// a group, whatever the number of tokens: a token's result does not depend on its batch.
// Integer parts are exact, so their order is free.
#pragma once

#include <utility>

#include "kernels/types.hpp"
#include "quant/tiles.hpp"

namespace tael {

template <class Fn, int... i> inline __attribute__((always_inline)) void unrolled(
    Fn fn, std::integer_sequence<int, i...>) {
  (fn(std::integral_constant<int, i>{}), ...);
}

template <class S, class T, int M> struct QuantizedTile {
  using F = typename S::F;
  using I = typename S::I;

  static void run(const uint8_t* tile, int64_t num_groups, const QuantizedRows& x, int64_t m0,
                  float* out, int64_t out_stride) {
    F acc[M];
    for (int m = 0; m < M; ++m) acc[m] = S::zero();
    for (int64_t g0 = 0; g0 < num_groups; g0 += T::kGroups, tile += T::kBlockBytes) {
      const T block(tile);
      for (int g = 0; g < T::kGroups; ++g) {
        if constexpr (T::kSub == 32)
          add_group32(block, tile, g, g0 + g, x, m0, acc);
        else
          add_group16(block, tile, g, g0 + g, x, m0, acc);
      }
    }
    for (int m = 0; m < M; ++m) S::store(out + (m0 + m) * out_stride, acc[m]);
  }

 private:
  template <int first, int count>
  static inline __attribute__((always_inline)) void add_steps(const uint8_t* tile, int g, int64_t column,
                                                              const QuantizedRows& x, int64_t m0, I* dot) {
    unrolled([&](auto i) {
      constexpr int step = first + decltype(i)::value;
      const typename S::B w = T::template values<step>(tile, g);
      for (int m = 0; m < M; ++m)
        dot[m] = S::template dot<T::kZero>(dot[m], w, x.values(m0 + m) + column + 4 * step);
    }, std::make_integer_sequence<int, count>{});
  }

  static inline __attribute__((always_inline)) void add_group32(
      const T& block, const uint8_t* tile, int g, int64_t group, const QuantizedRows& x, int64_t m0, F* acc) {
    I dot[M];
    for (int m = 0; m < M; ++m) {
      const int32_t* sums = x.sums(m0 + m) + 2 * group;
      dot[m] = S::template dot_start<T::kZero>(sums[0] + sums[1]);
    }
    add_steps<0, 8>(tile, g, group * 32, x, m0, dot);
    const F scale = block.scale(g);
    for (int m = 0; m < M; ++m) {
      const float xs = x.scales(m0 + m)[group];
      acc[m] = S::fma(S::from_int(dot[m]), S::mul(scale, S::splat(xs)), acc[m]);
      if constexpr (T::kHasMin) {
        const int32_t* sums = x.sums(m0 + m) + 2 * group;
        acc[m] = S::fma(block.minimum(g), S::splat(xs * float(sums[0] + sums[1])), acc[m]);
      }
    }
  }

  static inline __attribute__((always_inline)) void add_group16(
      const T& block, const uint8_t* tile, int g, int64_t group, const QuantizedRows& x, int64_t m0, F* acc) {
    I low[M], high[M];
    for (int m = 0; m < M; ++m) {
      const int32_t* sums = x.sums(m0 + m) + 2 * group;
      low[m] = S::template dot_start<T::kZero>(sums[0]);
      high[m] = S::template dot_start<T::kZero>(sums[1]);
    }
    add_steps<0, 4>(tile, g, group * 32, x, m0, low);
    add_steps<4, 4>(tile, g, group * 32, x, m0, high);
    const I scale_low = block.sub_scale(2 * g), scale_high = block.sub_scale(2 * g + 1);
    const F scale = block.scale(g);
    for (int m = 0; m < M; ++m) {
      const float xs = x.scales(m0 + m)[group];
      const I dot = S::add_int(S::mul_int(low[m], scale_low), S::mul_int(high[m], scale_high));
      acc[m] = S::fma(S::from_int(dot), S::mul(scale, S::splat(xs)), acc[m]);
      if constexpr (T::kHasMin) {
        const int32_t* sums = x.sums(m0 + m) + 2 * group;
        const I minimums = S::add_int(S::mul_int(block.sub_minimum(2 * g), S::splat_int(sums[0])),
                                      S::mul_int(block.sub_minimum(2 * g + 1), S::splat_int(sums[1])));
        acc[m] = S::fma(block.minimum(g), S::mul(S::from_int(minimums), S::splat(xs)), acc[m]);
      }
    }
  }
};

// Columns of a float tile: load<k>(tile) is column 2 * pair + k of 16 rows.
template <class S> struct F32Columns {
  static constexpr int kPairBytes = 128;
  static typename S::F load(const uint8_t* pair, int k) { return S::load((const float*)pair + 16 * k); }
};
template <class S> struct F16Columns {
  static constexpr int kPairBytes = 64;
  static typename S::F load(const uint8_t* pair, int k) { return S::load_f16(pair + 32 * k); }
};
template <class S> struct BF16Columns {
  static constexpr int kPairBytes = 64;
  static typename S::F load(const uint8_t* pair, int k) {
    return k == 0 ? S::load_bf16_even((const uint16_t*)pair) : S::load_bf16_odd((const uint16_t*)pair);
  }
};

template <class S, class T, int M> struct FloatTile {
  static void run(const uint8_t* tile, int64_t num_groups, const FloatRows& x, int64_t m0, float* out,
                  int64_t out_stride) {
    typename S::F acc[M];
    for (int m = 0; m < M; ++m) acc[m] = S::zero();
    for (int64_t k = 0; k < num_groups * kGroupColumns; k += 2, tile += T::kPairBytes)
      for (int i = 0; i < 2; ++i) {
        const typename S::F w = T::load(tile, i);
        for (int m = 0; m < M; ++m) acc[m] = S::fma(w, S::splat(x.values(m0 + m)[k + i]), acc[m]);
      }
    for (int m = 0; m < M; ++m) S::store(out + (m0 + m) * out_stride, acc[m]);
  }
};

template <template <class, class, int> class Tile, class S, class T, class Rows>
void matmul(const uint8_t* tiles, int64_t stride, int64_t num_groups, int64_t first_tile, int64_t last_tile,
            const Rows& x, int64_t num_tokens, float* out, int64_t out_stride) {
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const uint8_t* tile = tiles + t * stride;
    float* column = out + t * kTileRows;
    int64_t m = 0;
    for (; m + 8 <= num_tokens; m += 8) Tile<S, T, 8>::run(tile, num_groups, x, m, column, out_stride);
    if (num_tokens - m >= 4) Tile<S, T, 4>::run(tile, num_groups, x, m, column, out_stride), m += 4;
    if (num_tokens - m >= 2) Tile<S, T, 2>::run(tile, num_groups, x, m, column, out_stride), m += 2;
    if (num_tokens - m >= 1) Tile<S, T, 1>::run(tile, num_groups, x, m, column, out_stride);
  }
}

}  // namespace tael
