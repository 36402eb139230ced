// Latents between the stages of the pyramid, and the two branches of guidance.

#pragma once

#include "types.h"

namespace helios {

// out = alpha * x, each element repeated over 2 x 2, plus beta * noise; the noise of a 2 x 2 block
// is factor * draws, rounded to noise_dtype. Each product is rounded to its operand's dtype and the
// sum to the wider one, as torch promotes them.
struct UpsampleRenoise {
  const void* x;        // [planes, rows, columns] of x_dtype
  const float* draws;   // [planes, rows, columns, 4]
  const float* factor;  // [4, 4]
  void* out;            // [planes, 2 * rows, 2 * columns] of the wider of both dtypes
  std::int64_t planes, rows, columns;
  float alpha, beta;
  DType x_dtype, noise_dtype;
};

// out = negative + scale * (positive - negative), rounded after every operation; with zero_star the
// negative branch is first multiplied by <positive, negative> / (|negative|^2 + 1e-8) of its
// sample, summed in a fixed order in float64.
struct CfgCombine {
  const void* positive;  // [batch, count] of dtype
  const void* negative;
  void* out;
  double* workspace;  // [batch, kCfgBlocks, 2] where zero_star
  std::int64_t batch, count;
  float scale;
  bool zero_star;
  DType dtype;
};

constexpr std::int64_t kCfgBlocks = 64;

void upsample_renoise_cpu(const UpsampleRenoise& args) noexcept;
int upsample_renoise_cuda(const UpsampleRenoise& args, void* stream) noexcept;
void cfg_combine_cpu(const CfgCombine& args) noexcept;
int cfg_combine_cuda(const CfgCombine& args, void* stream) noexcept;

}  // namespace helios
