// One row in e4m3 on the CPU, from numbers that are computed as they are read.

#pragma once

#include "cpu.h"
#include "quantize.h"

namespace helios {
namespace HELIOS_ISA {

// To nearest, ties to even; 480 and more are NaN, as in torch. Without branches, for vectors.
inline uint8_t e4m3_of(float x) {
  uint32_t bits, steps;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  // From 2^-6 on: the exponent's bias is 7 instead of 127, and 20 bits of mantissa go.
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  // Below it the numbers are multiples of 2^-9; a sum with 1.5 * 2^23 rounds to whole ones.
  const float rounded = fabsf(x) * 512.0f + 12582912.0f;
  memcpy(&steps, &rounded, sizeof steps);
  uint32_t code = magnitude < 0x3c800000u ? steps & 0xffu : normal;
  code = magnitude >= 0x43f00000u ? 0x7fu : code;
  return static_cast<uint8_t>(sign | code);
}

// value(i) is asked twice for every i; returns the row's scale.
template <typename Value>
inline float quantize_row(Value value, int64_t width, uint8_t* out) {
  float top = 0.0f;
  int num_nan = 0;
#pragma omp simd reduction(max : top) reduction(+ : num_nan)
  for (int64_t i = 0; i < width; ++i) {
    const float size = fabsf(value(i));
    top = size > top ? size : top;
    num_nan += size != size;
  }
  if (num_nan > 0) top = NAN;
  if (top < kLeastTop) top = kLeastTop;
  const float factor = kLargestE4m3 / top;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = e4m3_of(value(i) * factor);
  return top / kLargestE4m3;
}

}  // namespace HELIOS_ISA
}  // namespace helios
