// out[token, row] = sum over columns of weight[row, column] * x[token, column], for 16-row tiles.
//
// Every output is accumulated over the scales of its row in ascending order of columns, one fused
// multiply-add each (and one for a minimum), whatever the number of tokens: a token's result does
// not depend on its batch. Integer parts are exact, so their order is free.
//
// Few packs of tokens take their weights from the tile as they unpack them, one pack after the other while the
// tile is in the cache; more tokens take them from a panel, for which a piece of a few tiles has been unpacked
// once: scales and minimums, and the values if that is worth it.
#pragma once

#include "kernels/matmul/byte_tiles.hpp"
#include "kernels/matmul/panel.hpp"

namespace tael {

// With the values as bytes.
template <class S, int sub, int zero, bool has_min> struct Panel : PanelScales<S, sub, zero, has_min> {
  alignas(64) uint8_t bytes[kPanelGroups * tiles::kBytes];

  template <int step> typename S::B values(int g) const {
    return S::load_bytes(bytes + g * tiles::kBytes + step * 64);
  }

  template <class T> void unpack(const uint8_t* tile, int num_groups) {
    for (int first = 0; first < num_groups; first += T::kGroups, tile += T::kBlockBytes) {
      const T block(tile);
      for (int g = 0; g < T::kGroups; ++g) {
        unrolled([&](auto step) {
          S::store_bytes(bytes + (first + g) * tiles::kBytes + step * 64, block.template values<step>(g));
        }, std::make_integer_sequence<int, 8>{});
        this->unpack_scales(block, g, first + g);
      }
    }
  }
};

// With the values in the tile: beside dot products that leave vector units idle, to unpack them for every pack
// of tokens takes less than to write and read more bytes. Formats whose values take more than two instructions
// (Q5_0, Q6_K) lose by it, and so does AVX2.
template <class S, class T> struct PackedPanel : PanelScales<S, T::kSub, T::kZero, T::kHasMin> {
  const uint8_t* blocks;

  template <int step> typename S::B values(int g) const {
    return T::template packed_values<step>(blocks + g / T::kGroups * T::kBlockBytes, g % T::kGroups);
  }

  template <class> void unpack(const uint8_t* tile, int num_groups) {
    blocks = tile;
    for (int first = 0; first < num_groups; first += T::kGroups, tile += T::kBlockBytes) {
      const T block(tile);
      for (int g = 0; g < T::kGroups; ++g) this->unpack_scales(block, g, first + g);
    }
  }
};

template <class S, class T> struct PanelOf { using type = Panel<S, T::kSub, T::kZero, T::kHasMin>; };
template <class S, class T> requires(S::kIdleUnits && T::kCheapValues) struct PanelOf<S, T> {
  using type = PackedPanel<S, T>;
};

// acc[tile][token] += group g of each tile times the same group of kTokens tokens. `x` is the
// group in a pack of pack_tokens, `first` the first of the tokens in it.
template <class S, class W, int kTiles, int kTokens>
inline __attribute__((always_inline)) void add_group(const W* const (&w)[kTiles], int g, const uint8_t* x,
                                                     int pack_tokens, int first,
                                                     typename S::F (&acc)[kTiles][kTokens]) {
  // Lambdas that are not inlined keep the accumulators in memory.
  const int8_t* values = (const int8_t*)x + first * kGroupColumns;
  const QuantizedGroup* info = (const QuantizedGroup*)(x + pack_tokens * kGroupColumns) + first;
  unrolled([&](auto part) __attribute__((always_inline)) {
    constexpr int kSteps = W::kSub / 4, kParts = kGroupColumns / W::kSub;
    typename S::I dot[kTiles][kTokens];
    for (int m = 0; m < kTokens; ++m) {
      const auto start = S::template dot_start<W::kZero>(
          kParts == 1 ? S::add_int(S::splat_int(info[m].sums[0]), S::splat_int(info[m].sums[1]))
                      : S::splat_int(info[m].sums[part]));
      for (int t = 0; t < kTiles; ++t) dot[t][m] = start;
    }
    unrolled([&](auto i) __attribute__((always_inline)) {
      constexpr int step = decltype(part)::value * kSteps + decltype(i)::value;
      typename S::B weights[kTiles];
      for (int t = 0; t < kTiles; ++t) weights[t] = w[t]->template values<step>(g);
      for (int m = 0; m < kTokens; ++m) {
        const typename S::X four = S::splat_four(values + m * kGroupColumns + 4 * step);
        for (int t = 0; t < kTiles; ++t) dot[t][m] = S::template dot<W::kZero>(dot[t][m], weights[t], four);
      }
    }, std::make_integer_sequence<int, kSteps>{});
    for (int t = 0; t < kTiles; ++t) {
      const typename S::F scale = w[t]->scale(g, part);
      for (int m = 0; m < kTokens; ++m)
        acc[t][m] = S::fma(S::from_int(dot[t][m]), S::mul(scale, S::splat(info[m].scale)), acc[t][m]);
      if constexpr (W::kHasMin) {
        const typename S::F minimum = w[t]->minimum(g, part);
        for (int m = 0; m < kTokens; ++m) {
          const float sum = kParts == 1 ? info[m].scaled_sum : info[m].scale * float(info[m].sums[part]);
          acc[t][m] = S::fma(minimum, S::splat(sum), acc[t][m]);
        }
      }
    }
  }, std::make_integer_sequence<int, kGroupColumns / W::kSub>{});
}

// One tile times the tokens of one pack, of which the first fetches what lies behind the tile.
template <class S, class T, int kTokens, bool fetch>
void tile_times_pack(const uint8_t* tile, int64_t num_groups, const uint8_t* x, int pack_tokens, int first,
                     float* out, int64_t out_stride) {
  typename S::F acc[1][kTokens];
  for (int m = 0; m < kTokens; ++m) acc[0][m] = S::zero();
  for (int64_t g0 = 0; g0 < num_groups; g0 += T::kGroups, tile += T::kBlockBytes) {
    const T block(tile);
    const T* const blocks[1] = {&block};
    for (int g = 0; g < T::kGroups; ++g, x += pack_tokens * kGroupBytes) {
      for (int i = 0; fetch && i < T::kBlockBytes / T::kGroups; i += 64)
        prefetch(tile + g * (T::kBlockBytes / T::kGroups) + i + kPrefetchBytes);
      add_group<S, T, 1, kTokens>(blocks, g, x, pack_tokens, first, acc);
    }
  }
  for (int m = 0; m < kTokens; ++m) S::store(out + (first + m) * out_stride, acc[0][m]);
}

// Adds num_groups groups of the panels to out.
template <class S, class P, int kTiles, int kTokens>
void panels_times_pack(const P* panels, int num_groups, const uint8_t* x, int pack_tokens, int first, bool begin,
                       Ahead& ahead, float* out, int64_t out_stride) {
  const P* w[kTiles];
  typename S::F acc[kTiles][kTokens];
  for (int t = 0; t < kTiles; ++t) {
    w[t] = panels + t;
    for (int m = 0; m < kTokens; ++m)
      acc[t][m] = begin ? S::zero() : S::load(out + (first + m) * out_stride + t * kTileRows);
  }
  for (int g = 0; g < num_groups; ++g, x += pack_tokens * kGroupBytes) {
    ahead.fetch_share<kTiles>();
    add_group<S, P, kTiles, kTokens>(w, g, x, pack_tokens, first, acc);
  }
  for (int t = 0; t < kTiles; ++t)
    for (int m = 0; m < kTokens; ++m) S::store(out + (first + m) * out_stride + t * kTileRows, acc[t][m]);
}

// Calls fn(first token, number as a constant) over a pack, at most kMost tokens at a time.
template <int kMost, class Fn> inline __attribute__((always_inline)) void split_pack(int pack_tokens, Fn fn) {
  int first = 0;
  for (; pack_tokens - first >= kMost; first += kMost) fn(first, std::integral_constant<int, kMost>{});
  unrolled([&](auto i) {
    if (pack_tokens - first == i + 1) fn(first, std::integral_constant<int, i + 1>{});
  }, std::make_integer_sequence<int, kMost - 1>{});
}

template <class S, class T, int kTiles>
void panel_matmul(const uint8_t* tiles, int64_t stride, const QuantizedRows& x, float* out, int64_t out_stride) {
  using P = typename PanelOf<S, T>::type;
  P panels[kTiles];
  for (int64_t g0 = 0; g0 < x.num_groups; g0 += kPanelGroups) {
    const int groups = x.num_groups - g0 < kPanelGroups ? int(x.num_groups - g0) : kPanelGroups;
    const uint8_t* piece = tiles + g0 / T::kGroups * T::kBlockBytes;
    const int64_t piece_bytes = groups / T::kGroups * T::kBlockBytes;
    for (int t = 0; t < kTiles; ++t) panels[t].template unpack<T>(piece + t * stride, groups);
    // Behind the last piece of these tiles lies the first of the next.
    const bool last = g0 + groups == x.num_groups;
    Ahead ahead{last ? tiles + kTiles * stride : piece + piece_bytes, stride,
                piece_bytes / (groups * x.num_packs()) + 1};
    for (int64_t p = 0; p < x.num_packs(); ++p) {
      const int n = x.pack_tokens(p);
      const uint8_t* pack = x.pack(p) + g0 * n * kGroupBytes;
      float* rows = out + p * x.pack_size * out_stride;
      split_pack<S::kPanelTokens>(n, [&](int first, auto count) {
        panels_times_pack<S, P, kTiles, count>(panels, groups, pack, n, first, g0 == 0, ahead, rows,
                                             out_stride);
      });
    }
  }
}

// Tiles first_tile to last_tile - 1; out[0] is row 0 of the first of them.
template <class S, class T>
void quantized_matmul(const uint8_t* tiles, int64_t stride, int64_t first_tile, int64_t last_tile,
                      const QuantizedRows& x, float* out, int64_t out_stride) {
  int64_t t = first_tile;
  const int64_t num_packs = x.num_packs();
  const auto times_pack = [&](int64_t tile, int64_t p, float* rows, auto fetch) __attribute__((always_inline)) {
    const int n = x.pack_tokens(p);
    split_pack<S::kTileTokens>(n, [&](int first, auto count) {
      tile_times_pack<S, T, count, fetch>(tiles + tile * stride, x.num_groups, x.pack(p), n, first,
                                          rows + p * x.pack_size * out_stride, out_stride);
    });
  };
  if constexpr (HasByteTiles<S>) {
    // A pack that is not whole is multiplied as few packs are; it may be the only one.
    const int64_t whole = x.pack_size == S::kWidePack ? x.num_tokens / S::kWidePack : 0;
    for (; whole > 0 && t + 2 <= last_tile; t += 2, out += 2 * kTileRows) {
      byte_tiles_matmul<S, T>(tiles + t * stride, stride, x, whole, out, out_stride);
      for (int64_t p = whole; p < num_packs; ++p)
        for (int i = 0; i < 2; ++i) times_pack(t + i, p, out + i * kTileRows, std::false_type{});
    }
  }
  if (num_packs <= S::kTilePacks) {
    for (; t < last_tile; ++t, out += kTileRows) {
      times_pack(t, 0, out, std::true_type{});
      for (int64_t p = 1; p < num_packs; ++p) times_pack(t, p, out, std::false_type{});
    }
    return;
  }
  for (; t + S::kPanelTiles <= last_tile; t += S::kPanelTiles, out += S::kPanelTiles * kTileRows)
    panel_matmul<S, T, S::kPanelTiles>(tiles + t * stride, stride, x, out, out_stride);
  for (; t < last_tile; ++t, out += kTileRows) panel_matmul<S, T, 1>(tiles + t * stride, stride, x, out, out_stride);
}

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

template <class S, class T, int M>
void float_tile(const uint8_t* tile, const FloatRows& x, int64_t m0, float* out, int64_t out_stride) {
  typename S::F acc[M];
  for (int m = 0; m < M; ++m) acc[m] = S::zero();
  for (int64_t k = 0; k < x.columns; k += 2, tile += T::kPairBytes)
    for (int i = 0; i < 2; ++i) {
      const typename S::F w = T::load(tile, i);
      for (int m = 0; m < M; ++m) acc[m] = S::fma(w, S::splat(x.row(m0 + m)[k + i]), acc[m]);
    }
  for (int m = 0; m < M; ++m) S::store(out + (m0 + m) * out_stride, acc[m]);
}

template <class S, class T>
void float_matmul(const uint8_t* tiles, int64_t stride, int64_t first_tile, int64_t last_tile, const FloatRows& x,
                  float* out, int64_t out_stride) {
  for (int64_t t = first_tile; t < last_tile; ++t, out += kTileRows) {
    const uint8_t* tile = tiles + t * stride;
    int64_t m = 0;
    for (; m + 8 <= x.num_tokens; m += 8) float_tile<S, T, 8>(tile, x, m, out, out_stride);
    if (x.num_tokens - m >= 4) float_tile<S, T, 4>(tile, x, m, out, out_stride), m += 4;
    if (x.num_tokens - m >= 2) float_tile<S, T, 2>(tile, x, m, out, out_stride), m += 2;
    if (x.num_tokens - m >= 1) float_tile<S, T, 1>(tile, x, m, out, out_stride);
  }
}

}  // namespace tael
