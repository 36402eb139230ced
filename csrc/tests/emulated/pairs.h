// Operations on two 16-bit numbers: each computed exactly and rounded once, NaN where an operand
// is.

#pragma once

#define HELIOS_EMULATE_PAIR(Two, name, widen, narrow, result)  \
  inline Two name(Two first, Two second) {                     \
    const auto each = [](float a, float b) { return result; }; \
    return {narrow(each(widen(first.x), widen(second.x))),     \
            narrow(each(widen(first.y), widen(second.y)))};    \
  }

#define HELIOS_EMULATE_PAIRS(Two, widen, narrow)                                                 \
  HELIOS_EMULATE_PAIR(Two, __hmul2, widen, narrow, a* b)                                         \
  HELIOS_EMULATE_PAIR(Two, __hadd2, widen, narrow, a + b)                                        \
  HELIOS_EMULATE_PAIR(Two, __hmax2_nan, widen, narrow, a != a || b != b ? a + b : a > b ? a : b) \
  HELIOS_EMULATE_PAIR(Two, __hmin2_nan, widen, narrow, a != a || b != b ? a + b : a < b ? a : b)
