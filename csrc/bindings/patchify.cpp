#include "../kernels/patchify.h"

#include "ops.h"

namespace helios {
namespace {

void check_kernel(const Ints& kernel, const char* name) {
  STD_TORCH_CHECK(kernel.size() == 3 && kernel[0] > 0 && kernel[1] > 0 && kernel[2] > 0, name,
                  " must be three positive sizes");
}

SolverStep step_of(SolverStep::Rule rule, const Tensor& latents, const Tensor& velocity,
                   const Tensor& out, const Ints& patch) {
  SolverStep args{};
  args.rule = rule;
  check_kernel(patch, "patch");
  STD_TORCH_CHECK(latents.dim() == 5, "latents must be [batch, channels, frames, rows, columns]");
  check_same(latents, velocity, "velocity"), check_same(latents, out, "out"),
      check_shape(latents, out, "out");
  check_contiguous(latents, "latents"), check_contiguous(velocity, "velocity"),
      check_contiguous(out, "out");
  check_numel(velocity, latents.numel(), "velocity");
  args.batch = latents.size(0), args.channels = latents.size(1);
  for (int d = 0; d < 3; ++d) {
    args.size[d] = latents.size(d + 2), args.patch[d] = patch[d];
    STD_TORCH_CHECK(args.size[d] % args.patch[d] == 0, "latents must be a multiple of the patch");
  }
  args.velocity = velocity.const_data_ptr(), args.velocity_dtype = dtype_of(velocity, "velocity");
  args.latents = latents.const_data_ptr(), args.latents_dtype = dtype_of(latents, "latents");
  args.out = out.mutable_data_ptr(), args.out_dtype = dtype_of(out, "out");
  for (const Tensor* x : {&latents, &out}) {
    const DType dtype = dtype_of(*x, "latents and out");
    STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == args.velocity_dtype,
                    "latents and out must be float32 or of the velocity's dtype");
  }
  return args;
}

}  // namespace

void bind_patch_gather(const Tensor latents, const Tensor rows, const Ints kernel,
                       int64_t first_row) {
  PatchGather args{};
  check_kernel(kernel, "kernel");
  STD_TORCH_CHECK(latents.dim() == 5, "latents must be [batch, channels, frames, rows, columns]");
  STD_TORCH_CHECK(rows.dim() == 3, "rows must be [batch, rows, elements]");
  check_same(latents, rows, "rows"), check_contiguous(rows, "rows");
  args.latents.data = latents.data_ptr();
  for (int d = 0; d < 5; ++d) args.latents.strides[d] = latents.stride(d);
  args.batch = latents.size(0), args.channels = latents.size(1);
  int64_t tokens = 1;
  for (int d = 0; d < 3; ++d) {
    args.size[d] = latents.size(d + 2), args.kernel[d] = kernel[d];
    tokens *= (args.size[d] + kernel[d] - 1) / kernel[d];
  }
  args.rows = rows.mutable_data_ptr(), args.first_row = first_row, args.num_rows = rows.size(1);
  args.latents_dtype = dtype_of(latents, "latents"), args.rows_dtype = dtype_of(rows, "rows");
  STD_TORCH_CHECK(rows.size(0) == args.batch &&
                      rows.size(2) == args.channels * kernel[0] * kernel[1] * kernel[2],
                  "rows must hold a patch each");
  STD_TORCH_CHECK(first_row >= 0 && first_row + args.num_rows <= tokens, "rows ", first_row, " to ",
                  first_row + args.num_rows, " lie outside the ", tokens, " patches");
  if (rows.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(patch_gather));
}

void bind_euler_step(const Tensor latents, const Tensor velocity, const Tensor out,
                     const Ints patch, double delta) {
  SolverStep args = step_of(SolverStep::Rule::kEuler, latents, velocity, out, patch);
  args.scale = delta;
  if (out.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

void bind_dmd_step(const Tensor latents, const Tensor velocity, const MaybeTensor start,
                   const Tensor out, const Ints patch, double sigma, double sigma_next) {
  SolverStep args = step_of(SolverStep::Rule::kDmd, latents, velocity, out, patch);
  args.sigma = sigma, args.scale = sigma_next;
  if (start.has_value()) {
    check_same(latents, *start, "start"), check_shape(latents, *start, "start"),
        check_contiguous(*start, "start");
    check_dtype(*start, out.scalar_type(), "start");
    args.start = start->const_data_ptr();
  }
  if (out.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

void bind_unipc_step(const Tensor latents, const Tensor velocity, const MaybeTensor previous_base,
                     const std::vector<Tensor> history, const Tensor x0, const Tensor base,
                     const Tensor out, const Ints patch, double sigma, const Floats correct,
                     const Floats predict) {
  SolverStep args = step_of(SolverStep::Rule::kUniPC, latents, velocity, out, patch);
  const auto state = [&](const Tensor& x, const char* name) {
    check_same(latents, x, name), check_shape(latents, x, name), check_contiguous(x, name);
    check_dtype(x, ScalarType::Float, name);
    return x.data_ptr();
  };
  STD_TORCH_CHECK(history.size() <= kMaxHistory, "at most ", kMaxHistory, " earlier steps, got ",
                  history.size());
  STD_TORCH_CHECK(correct.size() == history.size() + 2 && predict.size() == history.size() + 2,
                  "correct (base, current, history) and predict (base, current, history) need ",
                  history.size() + 2, " numbers each");
  args.sigma = sigma, args.num_history = static_cast<int>(history.size());
  args.x0 = static_cast<float*>(state(x0, "x0")),
  args.base = static_cast<float*>(state(base, "base"));
  if (previous_base.has_value())
    args.previous_base = static_cast<const float*>(state(*previous_base, "previous_base"));
  args.correct_base = static_cast<float>(correct[0]),
  args.correct_current = static_cast<float>(correct[1]);
  args.predict_base = static_cast<float>(predict[0]),
  args.predict[0] = static_cast<float>(predict[1]);
  for (size_t k = 0; k < history.size(); ++k) {
    args.history[k] = static_cast<const float*>(state(history[k], "history"));
    args.correct[k] = static_cast<float>(correct[k + 2]),
    args.predict[k + 1] = static_cast<float>(predict[k + 2]);
  }
  if (out.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

}  // namespace helios
