// A piece of a few weight tiles, unpacked once for many tokens.
#pragma once

#include "common/unrolled.hpp"
#include "kernels/types.hpp"
#include "quant/tiles.hpp"

namespace tael {

// Groups of 32 columns in a panel: two tiles of it and the activations of a pack fit the L1 cache.
constexpr int kPanelGroups = 32;

// Bytes ahead of a weight that is used, from which its tile is fetched into the L2 cache: the hardware
// prefetcher stops at the ends of 4 KiB pages. Into the L1 cache, which waits for no more than 24 lines
// (Zen 4), and from half as far, products with one token took a quarter to a half longer.
constexpr int kPrefetchBytes = 8192;
inline void prefetch(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

// One tile's part of a panel: scales and minimums in float. It reads like an opened block of a weight
// format (quant/tiles.hpp).
template <class S, int sub, int zero, bool has_min> struct PanelScales {
  static constexpr int kSub = sub, kZero = zero, kParts = kGroupColumns / sub;
  static constexpr bool kHasMin = has_min;
  alignas(64) float scales[kPanelGroups * kParts * kTileRows];
  alignas(64) float minimums[has_min ? kPanelGroups * kParts * kTileRows : 1];

  typename S::F scale(int g, int part) const { return S::load(scales + (g * kParts + part) * kTileRows); }
  typename S::F minimum(int g, int part) const { return S::load(minimums + (g * kParts + part) * kTileRows); }

  // Of group g of an opened block, which is group `to` of the panel.
  template <class T> void unpack_scales(const T& block, int g, int to) {
    for (int part = 0; part < kParts; ++part) {
      const int at = (to * kParts + part) * kTileRows;
      S::store(scales + at, block.scale(g, part));
      if constexpr (has_min) S::store(minimums + at, block.minimum(g, part));
    }
  }
};

// Packed weights that are needed next, fetched in even shares while others are multiplied.
struct Ahead {
  const uint8_t* next;
  int64_t stride;      // between tiles
  int64_t share_bytes;
  int64_t begin = 0;

  template <int kTiles> inline __attribute__((always_inline)) void fetch_share() {
    const int64_t end = begin + share_bytes;
    for (int64_t i = (begin + 63) / 64 * 64; i < end; i += 64)
      for (int t = 0; t < kTiles; ++t) prefetch(next + t * stride + i);
    begin = end;
  }
};

}  // namespace tael
