#include "kernels/kv_block/pack.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/half.hpp"

namespace tael {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float rounded(float x, float least, float most) { return std::fmin(std::fmax(std::nearbyint(x), least), most); }

// A scale of 0 or NaN makes every value the same, whatever its number.
float inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// x = scale * out, |out| <= 127.
uint16_t to_int8(const float* x, int count, int8_t* out) {
  float largest = 0.0f;
  bool finite = true;
  for (int i = 0; i < count; ++i) {
    finite &= std::isfinite(x[i]);
    largest = std::fmax(largest, std::fabs(x[i]));
  }
  const uint16_t scale = float_to_bf16(finite ? largest / 127.0f : kNaN);
  const float factor = inverse(bf16_to_float(scale));
  for (int i = 0; i < count; ++i) out[i] = int8_t(rounded(x[i] * factor, -127.0f, 127.0f));
  return scale;
}

// x = scale * out + minimum, 0 <= out <= 15.
void to_nibbles(const float* x, int count, uint8_t* out, uint16_t* scale, uint16_t* minimum) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int i = 0; i < count; ++i) {
    finite &= std::isfinite(x[i]);
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  *minimum = float_to_bf16(low);
  const float start = bf16_to_float(*minimum);
  *scale = float_to_bf16(finite ? (high - start) / 15.0f : kNaN);
  const float factor = inverse(bf16_to_float(*scale));
  for (int i = 0; i < count; ++i) out[i] = uint8_t(rounded((x[i] - start) * factor, 0.0f, 15.0f));
}

void pack_keys(const uint16_t* keys, int head_dim, uint8_t* out) {
  uint16_t* scales = (uint16_t*)(out + kBlockTokens * head_dim);
  float x[kBlockTokens];
  int8_t q[kBlockTokens];
  for (int d = 0; d < head_dim; ++d) {
    for (int t = 0; t < kBlockTokens; ++t) x[t] = bf16_to_float(keys[key_place(head_dim, t, d)]);
    scales[d] = to_int8(x, kBlockTokens, q);
    for (int t = 0; t < kBlockTokens; ++t) out[key_place(head_dim, t, d)] = uint8_t(q[t]);
  }
}

void pack_values(KVFormat format, const uint16_t* values, int head_dim, uint8_t* out) {
  const int64_t bytes = kBlockTokens * int64_t(head_dim) / (format == KVFormat::Q8 ? 1 : 2);
  uint16_t* scales = (uint16_t*)(out + bytes);
  if (format == KVFormat::K8V4) memset(out, 0, bytes);
  float x[kMaxHeadDim];
  uint8_t q[kMaxHeadDim];
  for (int t = 0; t < kBlockTokens; ++t) {
    for (int d = 0; d < head_dim; ++d) x[d] = bf16_to_float(values[value_place(head_dim, t, d)]);
    if (format == KVFormat::Q8)
      scales[t] = to_int8(x, head_dim, (int8_t*)q);
    else
      to_nibbles(x, head_dim, q, &scales[t], &scales[kBlockTokens + t]);
    for (int d = 0; d < head_dim; ++d) {
      const int64_t at = value_place(head_dim, t, d);
      if (format == KVFormat::Q8)
        out[at] = q[d];
      else
        out[at / 32 * 16 + at % 16] |= uint8_t(q[d] << (at % 32 < 16 ? 0 : 4));
    }
  }
}

}  // namespace

void pack_head(KVFormat format, const uint16_t* head, int head_dim, uint8_t* out) {
  if (format == KVFormat::BF16) {
    memcpy(out, head, bf16_head_bytes(head_dim));
    return;
  }
  pack_keys(head, head_dim, out);
  pack_values(format, head + kBlockTokens * head_dim, head_dim, out + q8_key_bytes(head_dim));
}

}  // namespace tael
