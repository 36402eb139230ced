// Around the autoencoder's convolutions. Pictures are channels last: [batch, frames, rows, columns,
// channels], channels side by side.

#pragma once

#include "types.h"

namespace helios {

struct Pictures {
  void* data;
  std::int64_t strides[4];  // batch, frame, row, column, in elements
};

// What a convolution left to be added to its result: a bias and another branch's result.
struct Addends {
  const void* bias;   // [channels] of dtype, or null
  Pictures residual;  // as the pictures it goes with, or data null
};

// sum = x + (bias + residual), rounded once; out = silu(sum / max(|sum|, 1e-12) * sqrt(channels) *
// gamma), |sum| over channels. Where there is a residual, x becomes the sum. out may lie inside a
// larger buffer: behind the past frames of a causal convolution's input, say. 16-bit results are
// rounded after every product, as torch's own chain.
struct ChannelNormSilu {
  Pictures x, out;
  const void* gamma;  // [channels] of dtype
  Addends added;
  std::int64_t batch, frames, rows, columns, channels;
  bool silu;
  DType dtype;
};

// out = each pixel of x + (bias + residual) repeated over 2 x 2.
struct UpsampleNearest {
  Pictures x, out;
  Addends added;
  std::int64_t batch, frames, rows, columns, channels;  // of x
  DType dtype;
};

// out = x + (bias + residual), the sum of all rounded once; out may be x.
struct BiasResidual {
  Pictures x, out;
  Addends added;
  std::int64_t batch, frames, rows, columns, channels;
  DType dtype;
};

void channel_norm_silu_cpu(const ChannelNormSilu& args) noexcept;
int channel_norm_silu_cuda(const ChannelNormSilu& args, void* stream) noexcept;
void upsample_nearest_cpu(const UpsampleNearest& args) noexcept;
int upsample_nearest_cuda(const UpsampleNearest& args, void* stream) noexcept;
void bias_residual_cpu(const BiasResidual& args) noexcept;
int bias_residual_cuda(const BiasResidual& args, void* stream) noexcept;

}  // namespace helios
