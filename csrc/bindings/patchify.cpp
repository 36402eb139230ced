#include "../kernels/patchify.h"

#include "ops.h"

namespace helios {
namespace {

void check_kernel(const Ints& kernel, const char* name) {
  STD_TORCH_CHECK(kernel.size() == 3 && kernel[0] > 0 && kernel[1] > 0 && kernel[2] > 0, name,
                  " must be three positive sizes");
}

SolverStep step_of(SolverStep::Rule rule, const Tensor& latents, const Tensor& velocity,
                   const Tensor& coefficients, int64_t width, const Tensor& index,
                   const Ints& patch) {
  SolverStep args{};
  args.rule = rule;
  check_kernel(patch, "patch");
  STD_TORCH_CHECK(latents.dim() == 5, "latents must be [batch, channels, frames, rows, columns]");
  check_same(latents, velocity, "velocity"), check_same(latents, coefficients, "coefficients"),
      check_same(latents, index, "index");
  check_contiguous(latents, "latents"), check_contiguous(velocity, "velocity"),
      check_contiguous(coefficients, "coefficients");
  check_numel(velocity, latents.numel(), "velocity");
  args.batch = latents.size(0), args.channels = latents.size(1);
  for (int d = 0; d < 3; ++d) {
    args.size[d] = latents.size(d + 2), args.patch[d] = patch[d];
    STD_TORCH_CHECK(args.size[d] % args.patch[d] == 0, "latents must be a multiple of the patch");
  }
  args.velocity = velocity.const_data_ptr(), args.velocity_dtype = dtype_of(velocity, "velocity");
  args.latents = latents.mutable_data_ptr(), args.latents_dtype = dtype_of(latents, "latents");
  STD_TORCH_CHECK(
      args.latents_dtype == DType::kFloat32 || args.latents_dtype == args.velocity_dtype,
      "latents must be float32 or of the velocity's dtype");
  check_dtype(coefficients, ScalarType::Double, "coefficients");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) == width,
                  "coefficients must be [steps, ", width, "]");
  args.coefficients = static_cast<const double*>(coefficients.const_data_ptr());
  check_dtype(index, ScalarType::Long, "index"), check_numel(index, 1, "index");
  args.index = static_cast<const int64_t*>(index.const_data_ptr());
  // On a GPU nobody can look without waiting.
  STD_TORCH_CHECK(!index.is_cpu() || (*args.index >= 0 && *args.index < coefficients.size(0)),
                  "index must be below ", coefficients.size(0));
  return args;
}

}  // namespace

void bind_patch_gather(const Tensor latents, const Tensor rows, const Ints kernel,
                       int64_t first_row) {
  PatchGather args{};
  check_kernel(kernel, "kernel");
  STD_TORCH_CHECK(kernel[2] <= kMaxPatchWidth, "kernel must be at most ", kMaxPatchWidth,
                  " columns wide, got ", kernel[2]);
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

void bind_euler_step(const Tensor latents, const Tensor velocity, const Tensor coefficients,
                     const Tensor index, const Ints patch) {
  const SolverStep args =
      step_of(SolverStep::Rule::kEuler, latents, velocity, coefficients, 1, index, patch);
  if (latents.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

void bind_dmd_step(const Tensor latents, const Tensor velocity, const Tensor start,
                   const Tensor coefficients, const Tensor index, const Ints patch) {
  SolverStep args =
      step_of(SolverStep::Rule::kDmd, latents, velocity, coefficients, 2, index, patch);
  check_same(latents, start, "start"), check_shape(latents, start, "start"),
      check_contiguous(start, "start");
  check_dtype(start, latents.scalar_type(), "start");
  args.start = start.const_data_ptr();
  if (latents.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

void bind_unipc_step(const Tensor latents, const Tensor velocity, const Tensor history,
                     const Tensor base, const Tensor coefficients, const Tensor index,
                     const Ints patch) {
  STD_TORCH_CHECK(history.dim() == 6 && history.size(0) > 0,
                  "history must be [kept, batch, channels, frames, rows, columns]");
  const int64_t kept = history.size(0);
  SolverStep args = step_of(SolverStep::Rule::kUniPC, latents, velocity, coefficients, 6 + 2 * kept,
                            index, patch);
  for (const Tensor* x : {&history, &base}) {
    check_same(latents, *x, "history and base"), check_contiguous(*x, "history and base");
    check_dtype(*x, ScalarType::Float, "history and base");
  }
  check_shape(latents, base, "base"), check_numel(history, kept * latents.numel(), "history");
  args.kept = static_cast<int>(kept);
  args.history = static_cast<float*>(history.mutable_data_ptr());
  args.base = static_cast<float*>(base.mutable_data_ptr());
  if (latents.numel() == 0) return;
  launch(latents, args, HELIOS_TWINS(solver_step));
}

}  // namespace helios
