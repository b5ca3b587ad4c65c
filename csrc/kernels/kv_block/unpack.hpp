// The block of one KV head as 32 values of bf16 at a time, in the order of the bf16 layout (kernels/types.hpp):
//
//     key_pairs(d, half)  channels d and d + 1 of 16 tokens      [token][2]
//     value_pairs(t, d)   tokens t and t + 1 of 16 channels      [channel][2]
//
// Each also fetches the same place of the block that will be needed next.
#pragma once

#include "kernels/types.hpp"

namespace tael {

template <class S> struct PlainBlock {
  const uint16_t *block, *next;
  int head_dim;

  typename S::B key_pairs(int d, int half) const { return load((half * int64_t(head_dim) + d) * 16); }
  typename S::B value_pairs(int t, int d) const { return load((kBlockTokens + t) * int64_t(head_dim) + 2 * d); }

 private:
  typename S::B load(int64_t at) const {
    __builtin_prefetch(next + at, 0, 2);
    return S::load_bytes((const uint8_t*)(block + at));
  }
};

template <class S, KVFormat format> struct PackedBlock {
  const uint8_t *block, *next;
  int head_dim;

  typename S::B key_pairs(int d, int half) const {
    const int64_t at = (half * int64_t(head_dim) + d) * 16;
    return eight_bits(at, scales(kBlockTokens * int64_t(head_dim), d));
  }

  typename S::B value_pairs(int t, int d) const {
    const int64_t values = q8_key_bytes(head_dim), at = t * int64_t(head_dim) + 2 * d;
    if constexpr (format == KVFormat::Q8) {
      return eight_bits(values + at, scales(values + kBlockTokens * int64_t(head_dim), t));
    } else {
      const int64_t scales_at = values + kBlockTokens * int64_t(head_dim) / 2;
      const typename S::F scale = scales(scales_at, t), minimum = scales(scales_at, kBlockTokens + t);
      __builtin_prefetch(next + values + at / 2, 0, 2);
      const typename S::I bytes = S::load_u8(block + values + at / 2);
      return S::to_bf16(S::fma(scale, S::from_int(S::and_int(bytes, 15)), minimum),
                        S::fma(scale, S::from_int(S::template shr_int<4>(bytes)), minimum));
    }
  }

 private:
  // Two that alternate.
  typename S::F scales(int64_t at, int first) const {
    __builtin_prefetch(next + at + 2 * first, 0, 2);
    return S::splat_bf16_pair((const uint16_t*)(block + at) + first);
  }

  typename S::B eight_bits(int64_t at, typename S::F scale) const {
    __builtin_prefetch(next + at, 0, 2);
    return S::to_bf16(S::mul(S::from_int(S::load_s8(block + at)), scale),
                      S::mul(S::from_int(S::load_s8(block + at + 16)), scale));
  }
};

// K, then V, as PlainBlock reads them.
template <class S, class Block> void unpack_head(const Block& packed, int head_dim, uint16_t* out) {
  for (int half = 0; half < kBlockTokens / 16; ++half)
    for (int d = 0; d < head_dim; d += 2, out += 32) S::store_bytes((uint8_t*)out, packed.key_pairs(d, half));
  for (int t = 0; t < kBlockTokens; t += 2)
    for (int d = 0; d < head_dim; d += 16, out += 32) S::store_bytes((uint8_t*)out, packed.value_pairs(t, d));
}

}  // namespace tael
