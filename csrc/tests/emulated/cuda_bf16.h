// bfloat16 as CUDA converts it: to the nearest, ties to even, every NaN to one.

#pragma once

#include <cstdint>
#include <cstring>

#include "pairs.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t wide = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  std::uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  return {static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}

HELIOS_EMULATE_PAIRS(__nv_bfloat162, __bfloat162float, __float2bfloat16_rn)
