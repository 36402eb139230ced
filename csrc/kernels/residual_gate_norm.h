// x' = x + y * gate, and h = LayerNorm(x') * weight + bias, each row by the rows of its segment:
// the first num_history rows of every sample take row 0 of gate, weight and bias, the others row 1.

#pragma once

#include "types.h"

namespace helios {

struct ResidualGateNorm {
  Rows x;               // [batch, rows, width] in, and x' out where there is y
  Rows y;               // as x, or data null: x stays as it is
  const float* gate;    // [2, width] rows, or null: x' = x + y
  const float* weight;  // [2, width] rows; null with a null out
  const float* bias;    // [2, width] rows
  Rows out;             // as x, or data null: no norm
  Rows scale;           // [batch, rows, 1] float32: out is in e4m3, see quantize.h; or data null
  std::int64_t gate_stride;  // between row 0 and row 1, in elements; 0 for one row
  std::int64_t weight_stride, bias_stride;
  std::int64_t batch, rows, width, num_history;
  float eps;
  DType dtype;  // of x, y and out
};

// Roundings: the product and the sum in float32, x' to dtype; mean and variance of the rounded x'
// in float32; h once, and where it goes on to 8 bits once more.
void residual_gate_norm_cpu(const ResidualGateNorm& args) noexcept;
int residual_gate_norm_cuda(const ResidualGateNorm& args,
                            void* stream) noexcept;  // enqueues; returns cudaError_t

}  // namespace helios
