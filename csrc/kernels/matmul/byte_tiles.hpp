// Products with many tokens where the CPU multiplies tiles of bytes (AMX): two tiles of weights with a pack of
// sixteen tokens at a time. Sums are the same bits as those of dot products, since integers are exact and floats are
// added in the same order.
#pragma once

#include "kernels/matmul/panel.hpp"

namespace tael {

// With the values as int8, without their zero point.
template <class S, class T> struct SignedPanel : PanelScales<S, T::kSub, T::kZero, T::kHasMin> {
  alignas(64) int8_t bytes[kPanelGroups * tiles::kBytes];

  const int8_t* values(int g, int part) const { return bytes + g * tiles::kBytes + part * T::kSub * kTileRows; }

  void unpack(const uint8_t* tile, int num_groups) {
    for (int first = 0; first < num_groups; first += T::kGroups, tile += T::kBlockBytes) {
      const T block(tile);
      for (int g = 0; g < T::kGroups; ++g) {
        unrolled([&](auto step) {
          S::store_bytes((uint8_t*)bytes + (first + g) * tiles::kBytes + step * 64,
                         S::sub_bytes(block.template values<step>(g), T::kZero));
        }, std::make_integer_sequence<int, 8>{});
        this->unpack_scales(block, g, first + g);
      }
    }
  }
};

// Adds num_groups groups of two panels, times a pack of sixteen, to out.
template <class S, class P, class ByteTiles>
void panels_times_tokens(const P (&panels)[2], const ByteTiles& byte_tiles, int num_groups, const uint8_t* pack,
                         bool begin, Ahead& ahead, float* out, int64_t out_stride) {
  constexpr int kTokens = ByteTiles::kRows, kParts = P::kParts, kGroupsAtATime = 4;
  constexpr int64_t kPackGroup = kTokens * kGroupBytes;
  alignas(64) float acc[2][kTokens][kTileRows];
  // Products of some groups before the first of them is read: they take a while from the tiles to the cache.
  alignas(64) int32_t dots[kGroupsAtATime * kParts][2][kTokens][kTileRows];
  for (int t = 0; t < 2; ++t)
    for (int m = 0; m < kTokens; ++m)
      S::store(acc[t][m], begin ? S::zero() : S::load(out + m * out_stride + t * kTileRows));
  for (int first = 0; first < num_groups; first += kGroupsAtATime, pack += kGroupsAtATime * kPackGroup) {
    const int count = num_groups - first < kGroupsAtATime ? num_groups - first : kGroupsAtATime;
    byte_tiles.multiply(
        count * kParts,
        [&](int i) {
          const int g = i / kParts, part = i % kParts;
          return typename ByteTiles::Operands{(const int8_t*)pack + g * kPackGroup + part * P::kSub,
                                              {panels[0].values(first + g, part), panels[1].values(first + g, part)}};
        },
        dots[0][0][0]);
    for (int t = 0; t < 2; ++t) {
      typename S::F sums[kTokens];
      for (int m = 0; m < kTokens; ++m) sums[m] = S::load(acc[t][m]);
      for (int g = 0; g < count; ++g) {
        const QuantizedGroup* info = (const QuantizedGroup*)(pack + g * kPackGroup + kTokens * kGroupColumns);
        for (int part = 0; part < kParts; ++part) {
          const typename S::F scale = panels[t].scale(first + g, part);
          for (int m = 0; m < kTokens; ++m)
            sums[m] = S::fma(S::from_int(S::load_int(dots[g * kParts + part][t][m])),
                             S::mul(scale, S::splat(info[m].scale)), sums[m]);
          if constexpr (P::kHasMin) {
            const typename S::F minimum = panels[t].minimum(first + g, part);
            for (int m = 0; m < kTokens; ++m) {
              const float sum = kParts == 1 ? info[m].scaled_sum : info[m].scale * float(info[m].sums[part]);
              sums[m] = S::fma(minimum, S::splat(sum), sums[m]);
            }
          }
        }
      }
      for (int m = 0; m < kTokens; ++m) S::store(acc[t][m], sums[m]);
    }
    for (int g = 0; g < count; ++g) ahead.fetch_share<2>();
  }
  for (int t = 0; t < 2; ++t)
    for (int m = 0; m < kTokens; ++m) S::store(out + m * out_stride + t * kTileRows, S::load(acc[t][m]));
}

// Two tiles times the first packs.
template <class S, class T>
void byte_tiles_matmul(const uint8_t* tiles, int64_t stride, const QuantizedRows& x, int64_t num_packs, float* out,
                       int64_t out_stride) {
  SignedPanel<S, T> panels[2];
  for (int64_t g0 = 0; g0 < x.num_groups; g0 += kPanelGroups) {
    const int groups = x.num_groups - g0 < kPanelGroups ? int(x.num_groups - g0) : kPanelGroups;
    const uint8_t* piece = tiles + g0 / T::kGroups * T::kBlockBytes;
    const int64_t piece_bytes = groups / T::kGroups * T::kBlockBytes;
    for (int t = 0; t < 2; ++t) panels[t].unpack(piece + t * stride, groups);
    const bool last = g0 + groups == x.num_groups;
    Ahead ahead{last ? tiles + 2 * stride : piece + piece_bytes, stride, piece_bytes / (groups * num_packs) + 1};
    const typename S::template ByteTiles<T::kSub> byte_tiles;
    for (int64_t p = 0; p < num_packs; ++p)
      panels_times_tokens<S>(panels, byte_tiles, groups, x.pack(p) + g0 * x.pack_size * kGroupBytes, g0 == 0, ahead,
                             out + p * x.pack_size * out_stride, out_stride);
  }
}

}  // namespace tael
