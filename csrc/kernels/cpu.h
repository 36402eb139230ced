// Shared by the CPU twins. Each twin is compiled once per instruction set into a namespace of that
// name; dispatch.cpp picks one at run time. Only C headers here: inline functions of the standard
// library, compiled for AVX-512 and merged by the linker, would reach CPUs without it.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#ifndef HELIOS_ISA
#define HELIOS_ISA baseline
#endif

namespace helios {
namespace HELIOS_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  _Float16 value;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_float(Float16 x) { return static_cast<float>(x.value); }

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// To nearest, ties to even. Rounding by addition would turn some NaNs into numbers, so they are set
// apart.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  return {static_cast<_Float16>(x)};
}

template <typename T>
inline T* row_at(const Rows& rows, int64_t batch, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// Calls run<T>(args) for the dtype that args names.
#define HELIOS_FOR_DTYPE(dtype, run, args) \
  switch (dtype) {                         \
    case DType::kFloat32:                  \
      run<float>(args);                    \
      break;                               \
    case DType::kBFloat16:                 \
      run<BFloat16>(args);                 \
      break;                               \
    case DType::kFloat16:                  \
      run<Float16>(args);                  \
      break;                               \
  }

}  // namespace HELIOS_ISA
}  // namespace helios
