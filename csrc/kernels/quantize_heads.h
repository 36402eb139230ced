// Attention's operands in 8-bit floating point: queries, keys and values in e4m3 with a scale per
// sample and head that puts the head's largest magnitude at 448.

#pragma once

#include "types.h"

namespace helios {

// One of q, k and v: [batch, rows, heads, head_dim], the heads of a row side by side.
struct HeadRows {
  Rows x;
  std::uint8_t* out;  // [batch, rows, heads, head_dim] contiguous
  float* scale;       // [batch, heads]
  std::int64_t rows;
};

struct QuantizeHeads {
  HeadRows parts[3];
  float* workspace;  // [3, batch, heads, kHeadParts] of anything
  std::int64_t batch, heads, head_dim;
  DType dtype;  // of x
};

constexpr int kHeadParts = 128;  // rows are searched in so many parts at once

// out = e4m3(x * (448 / top)) to nearest, ties to even; scale = top / 448; top = max(|x|) over a
// head's rows, at least 1e-12. A NaN makes its head NaN.
void quantize_heads_cpu(const QuantizeHeads& args) noexcept;
int quantize_heads_cuda(const QuantizeHeads& args, void* stream) noexcept;

}  // namespace helios
