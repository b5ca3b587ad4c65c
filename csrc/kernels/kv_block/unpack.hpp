// A compressed block of one KV head back to bf16, in the same order (layouts: kernels/types.hpp).
#pragma once

#include "kernels/types.hpp"

namespace tael {

// `columns` values of each of num_pairs rows, every other one with the scale of its own of a pair.
template <class S>
void unpack_int8(const uint8_t* values, const uint16_t* scales, int pair, int columns, uint16_t* out) {
  const typename S::F scale = S::splat_bf16_pair(scales + 2 * pair);
  for (int i = 0; i < columns; i += 16)
    S::store_bf16(out + i, S::mul(S::from_int(S::load_s8(values + i)), scale));
}

template <class S> void unpack_keys_q8(const uint8_t* keys, int head_dim, uint16_t* out) {
  const uint16_t* scales = (const uint16_t*)(keys + kBlockTokens * head_dim);
  for (int half = 0; half < kBlockTokens / 16; ++half)
    for (int pair = 0; pair < head_dim / 2; ++pair, keys += 32, out += 32)
      unpack_int8<S>(keys, scales, pair, 32, out);
}

template <class S> void unpack_values_q8(const uint8_t* values, int head_dim, uint16_t* out) {
  const uint16_t* scales = (const uint16_t*)(values + kBlockTokens * head_dim);
  for (int pair = 0; pair < kBlockTokens / 2; ++pair, values += 2 * head_dim, out += 2 * head_dim)
    unpack_int8<S>(values, scales, pair, 2 * head_dim, out);
}

template <class S> void unpack_values_q4(const uint8_t* values, int head_dim, uint16_t* out) {
  using F = typename S::F;
  const uint16_t* scales = (const uint16_t*)(values + kBlockTokens * head_dim / 2);
  for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
    const F scale = S::splat_bf16_pair(scales + 2 * pair);
    const F minimum = S::splat_bf16_pair(scales + kBlockTokens + 2 * pair);
    for (int i = 0; i < head_dim; i += 16, values += 16, out += 32) {
      const typename S::I bytes = S::load_u8(values);
      S::store_bf16(out, S::fma(scale, S::from_int(S::and_int(bytes, 15)), minimum));
      S::store_bf16(out + 16, S::fma(scale, S::from_int(S::template shr_int<4>(bytes)), minimum));
    }
  }
}

// K, then V, of one head.
template <class S> void unpack_head(KVFormat format, const uint8_t* head, int head_dim, uint16_t* out) {
  unpack_keys_q8<S>(head, head_dim, out);
  const uint8_t* values = head + q8_key_bytes(head_dim);
  if (format == KVFormat::Q8)
    unpack_values_q8<S>(values, head_dim, out + kBlockTokens * head_dim);
  else
    unpack_values_q4<S>(values, head_dim, out + kBlockTokens * head_dim);
}

}  // namespace tael
