#include "../kernels/latents.h"

#include "ops.h"

namespace helios {

void bind_upsample_renoise(const Tensor x, const Tensor draws, const Tensor factor,
                           const Tensor out, double alpha, double beta, bool noise_is_wide) {
  UpsampleRenoise args{};
  STD_TORCH_CHECK(x.dim() == 5 && out.dim() == 5,
                  "x and out must be [batch, channels, frames, rows, columns]");
  for (const Tensor* other : {&draws, &factor, &out}) check_same(x, *other, "every tensor");
  for (const Tensor* other : {&x, &draws, &factor, &out}) check_contiguous(*other, "every tensor");
  check_dtype(draws, ScalarType::Float, "draws"), check_dtype(factor, ScalarType::Float, "factor");
  check_numel(draws, 4 * x.numel(), "draws"), check_numel(factor, 16, "factor"),
      check_numel(out, 4 * x.numel(), "out");
  args.x = x.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.draws = static_cast<const float*>(draws.const_data_ptr());
  args.factor = static_cast<const float*>(factor.const_data_ptr());
  args.planes = x.size(0) * x.size(1) * x.size(2), args.rows = x.size(3), args.columns = x.size(4);
  args.alpha = static_cast<float>(alpha), args.beta = static_cast<float>(beta);
  args.x_dtype = dtype_of(x, "x");
  check_dtype(out, x.scalar_type(), "out");
  args.noise_dtype = noise_is_wide ? DType::kFloat32 : DType::kBFloat16;
  STD_TORCH_CHECK(args.x_dtype == DType::kFloat32 || args.x_dtype == args.noise_dtype,
                  "x must be float32 or of the noise's dtype");
  if (out.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(upsample_renoise));
}

void bind_cfg_combine(const Tensor positive, const Tensor negative, const Tensor out,
                      const MaybeTensor workspace, double scale) {
  CfgCombine args{};
  for (const Tensor* x : {&negative, &out}) {
    check_same(positive, *x, "every tensor"), check_shape(positive, *x, "every tensor");
    check_dtype(*x, positive.scalar_type(), "every tensor");
  }
  for (const Tensor* x : {&positive, &negative, &out}) check_contiguous(*x, "every tensor");
  args.batch = positive.size(0), args.dtype = dtype_of(positive, "positive");
  args.count = args.batch == 0 ? 0 : positive.numel() / args.batch;
  args.positive = positive.const_data_ptr(), args.negative = negative.const_data_ptr();
  args.out = out.mutable_data_ptr(), args.scale = static_cast<float>(scale);
  args.zero_star = workspace.has_value();
  if (args.zero_star) {
    check_same(positive, *workspace, "workspace"),
        check_dtype(*workspace, ScalarType::Double, "workspace");
    check_contiguous(*workspace, "workspace"),
        check_numel(*workspace, args.batch * kCfgBlocks * 2, "workspace");
    args.workspace = static_cast<double*>(workspace->mutable_data_ptr());
  }
  if (out.numel() == 0) return;
  launch(positive, args, HELIOS_TWINS(cfg_combine));
}

}  // namespace helios
