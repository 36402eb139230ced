// Rows in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa, largest number 448) with a
// scale per row that puts the row's largest magnitude at 448.

#pragma once

#include "types.h"

namespace helios {

struct QuantizeRows {
  Rows x;             // [batch, rows, width]
  std::uint8_t* out;  // [batch, rows, width] contiguous
  float* scale;       // [batch * rows]
  std::int64_t batch, rows, width;
  bool gelu;    // of tanh-GELU of x, rounded to dtype, instead of x
  DType dtype;  // of x
};

constexpr float kLargestE4m3 = 448.0f;
constexpr float kGeluBeta = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kGeluKappa = 0.044715f;
constexpr float kLeastTop = 1e-12f;  // of a row's largest magnitude, so that zeros stay zeros

// out = e4m3(x * (448 / top)) to nearest, ties to even; scale = top / 448; top = max(|x|), at least
// 1e-12. A NaN makes its whole row NaN, an infinity its row's others zero and itself NaN.
void quantize_rows_cpu(const QuantizeRows& args) noexcept;
int quantize_rows_cuda(const QuantizeRows& args, void* stream) noexcept;

}  // namespace helios
