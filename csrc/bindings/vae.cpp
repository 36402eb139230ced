#include "../kernels/vae.h"

#include "ops.h"

namespace helios {
namespace {

// A [batch, channels, frames, rows, columns] tensor with channels side by side.
Pictures pictures_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 5, name, " must be [batch, channels, frames, rows, columns]");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must be channels last");
  return {x.data_ptr(), {x.stride(0), x.stride(2), x.stride(3), x.stride(4)}};
}

template <typename Args>
void fill_size(Args& args, const Tensor& x) {
  args.batch = x.size(0), args.channels = x.size(1), args.frames = x.size(2), args.rows = x.size(3);
  args.columns = x.size(4);
}

const void* per_channel(const Tensor& x, const Tensor& values, const char* name) {
  check_same(x, values, name), check_dtype(values, x.scalar_type(), name);
  check_contiguous(values, name), check_numel(values, x.size(1), name);
  return values.const_data_ptr();
}

// What is added to x: a bias per channel and pictures of x's shape, either of which may be missing.
Addends addends_of(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual) {
  Addends added{};
  if (bias.has_value()) added.bias = per_channel(x, *bias, "bias");
  if (residual.has_value()) {
    check_same(x, *residual, "residual"), check_shape(x, *residual, "residual");
    check_dtype(*residual, x.scalar_type(), "residual");
    added.residual = pictures_of(*residual, "residual");
  }
  return added;
}

}  // namespace

void bind_channel_norm_silu(const Tensor x, const Tensor gamma, const MaybeTensor bias,
                            const MaybeTensor residual, const Tensor out, bool silu) {
  ChannelNormSilu args{};
  args.x = pictures_of(x, "x"), args.out = pictures_of(out, "out"), args.dtype = dtype_of(x, "x");
  check_same(x, out, "out"), check_shape(x, out, "out"), check_dtype(out, x.scalar_type(), "out");
  fill_size(args, x);
  args.gamma = per_channel(x, gamma, "gamma"), args.silu = silu;
  args.added = addends_of(x, bias, residual);
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(channel_norm_silu));
}

void bind_upsample_nearest(const Tensor x, const MaybeTensor bias, const MaybeTensor residual,
                           const Tensor out) {
  UpsampleNearest args{};
  args.x = pictures_of(x, "x"), args.out = pictures_of(out, "out"), args.dtype = dtype_of(x, "x");
  check_same(x, out, "out"), check_dtype(out, x.scalar_type(), "out");
  fill_size(args, x);
  args.added = addends_of(x, bias, residual);
  STD_TORCH_CHECK(out.size(0) == args.batch && out.size(1) == args.channels &&
                      out.size(2) == args.frames && out.size(3) == 2 * args.rows &&
                      out.size(4) == 2 * args.columns,
                  "out must have twice the rows and columns");
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(upsample_nearest));
}

void bind_bias_residual(const Tensor x, const MaybeTensor bias, const MaybeTensor residual,
                        const Tensor out) {
  BiasResidual args{};
  args.x = pictures_of(x, "x"), args.out = pictures_of(out, "out"), args.dtype = dtype_of(x, "x");
  check_same(x, out, "out"), check_shape(x, out, "out"), check_dtype(out, x.scalar_type(), "out");
  fill_size(args, x);
  args.added = addends_of(x, bias, residual);
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(bias_residual));
}

}  // namespace helios
