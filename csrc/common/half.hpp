// Scalar conversions of 16-bit and 8-bit floats. Integer arithmetic only, so the results do not
// depend on the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace tael {

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
}

static inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Half of an OCP microscaling E8M0 scale, 2^(e - 128): MXFP4's codebook holds doubled values.
static inline float e8m0_half_to_float(uint8_t exponent) {
  return bits_to_float(exponent < 2 ? 0x00200000u << exponent : uint32_t(exponent - 1) << 23);
}

}  // namespace tael
