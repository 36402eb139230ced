// e4m3 by its definition: the nearest of its numbers, the even one of two.

#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

inline std::uint16_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t,
                                              __nv_fp8_interpretation_t) {
  const auto convert = [](float x) -> unsigned {
    if (std::isnan(x)) return 0x7f;
    unsigned best = 0;
    double least = INFINITY;
    for (unsigned code = 0; code < 0x7f; ++code) {
      const unsigned exponent = code >> 3, mantissa = code & 7;
      const double value = exponent == 0
                               ? std::ldexp(mantissa, -9)
                               : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
      const double distance = std::abs(std::abs(static_cast<double>(x)) - value);
      if (distance < least || (distance == least && code % 2 == 0)) best = code, least = distance;
    }
    return best | (std::signbit(x) ? 0x80u : 0u);
  };
  return static_cast<std::uint16_t>(convert(pair.x) | convert(pair.y) << 8);
}
