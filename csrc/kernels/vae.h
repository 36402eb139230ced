// Around the autoencoder's convolutions. Pictures are channels last: [batch, frames, rows, columns,
// channels], channels side by side.

#pragma once

#include "types.h"

namespace helios {

struct Pictures {
  void* data;
  std::int64_t strides[4];  // batch, frame, row, column, in elements
};

// out = silu(x / max(|x|, 1e-12) * sqrt(channels) * gamma), |x| over channels. out may lie inside a
// larger buffer: behind the past frames of a causal convolution's input, say. 16-bit results are
// rounded after every product, as torch's own chain.
struct ChannelNormSilu {
  Pictures x, out;
  const void* gamma;  // [channels] of dtype
  std::int64_t batch, frames, rows, columns, channels;
  bool silu;
  DType dtype;
};

// out = each pixel repeated over 2 x 2.
struct UpsampleNearest {
  Pictures x, out;
  std::int64_t batch, frames, rows, columns, channels;  // of x
  std::int64_t element_size;
};

// x += bias (per channel, or null) + residual (or data null), the sum of both rounded once.
struct BiasResidual {
  Pictures x, residual;
  const void* bias;  // [channels] of dtype
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
