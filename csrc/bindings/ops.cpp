// Every operator's schema. Mutated arguments are marked; nothing is returned, so callers own all
// memory.

#include "ops.h"

STABLE_TORCH_LIBRARY(helios, m) {
  m.def(
      "residual_gate_norm(Tensor(a!) x, Tensor? y, Tensor? gate, Tensor? weight, Tensor? bias, "
      "Tensor(b!)? out, Tensor(c!)? scale, "
      "int num_history, float eps) -> ()");
  m.def(
      "qk_rmsnorm_rope(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, Tensor rotation, Tensor? "
      "history_scale, "
      "int num_history, int first_query, float eps) -> ()");
  m.def(
      "qk_rmsnorm_rope_pack(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor rotation, Tensor? "
      "history_scale, "
      "Tensor(a!) packed, int[] heads, int num_history, int first_query, float eps) -> ()");
  m.def("rmsnorm_rows(Tensor(a!) x, Tensor weight, float eps) -> ()");
  m.def("unpack_heads(Tensor received, Tensor(a!) out, int[] heads) -> ()");
  m.def("merge_partials(Tensor(a!) out, Tensor(b!) lse, Tensor other, Tensor other_lse) -> ()");
  m.def("patch_gather(Tensor latents, Tensor(a!) rows, int[] kernel, int first_row) -> ()");
  m.def(
      "euler_step(Tensor(a!) latents, Tensor velocity, Tensor coefficients, Tensor index, int[] "
      "patch) -> ()");
  m.def(
      "dmd_step(Tensor(a!) latents, Tensor velocity, Tensor start, Tensor coefficients, Tensor "
      "index, int[] patch) -> ()");
  m.def(
      "unipc_step(Tensor(a!) latents, Tensor velocity, Tensor(b!) history, Tensor(c!) base, Tensor "
      "coefficients, Tensor index, int[] patch) -> ()");
  m.def(
      "upsample_renoise(Tensor x, Tensor draws, Tensor factor, Tensor(a!) out, float alpha, float "
      "beta, "
      "bool noise_is_wide) -> ()");
  m.def(
      "cfg_combine(Tensor positive, Tensor negative, Tensor(a!) out, Tensor(b!)? workspace, float "
      "scale) -> ()");
  m.def(
      "channel_norm_silu(Tensor(a!) x, Tensor gamma, Tensor? bias, Tensor? residual, Tensor(b!) "
      "out, bool silu) -> ()");
  m.def("upsample_nearest(Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("bias_residual(Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("quantize_rows(Tensor x, Tensor(a!) out, Tensor(b!) scale, bool gelu) -> ()");
  m.def(
      "quantize_heads(Tensor q, Tensor k, Tensor v, Tensor(a!) q_out, Tensor(b!) k_out, "
      "Tensor(c!) v_out, Tensor(d!) q_scale, Tensor(e!) k_scale, Tensor(f!) v_scale, "
      "Tensor(g!) workspace) -> ()");
}

#define HELIOS_IMPL(m)                                                           \
  m.impl("residual_gate_norm", TORCH_BOX(&helios::bind_residual_gate_norm));     \
  m.impl("qk_rmsnorm_rope", TORCH_BOX(&helios::bind_qk_rmsnorm_rope));           \
  m.impl("qk_rmsnorm_rope_pack", TORCH_BOX(&helios::bind_qk_rmsnorm_rope_pack)); \
  m.impl("rmsnorm_rows", TORCH_BOX(&helios::bind_rmsnorm_rows));                 \
  m.impl("unpack_heads", TORCH_BOX(&helios::bind_unpack_heads));                 \
  m.impl("merge_partials", TORCH_BOX(&helios::bind_merge_partials));             \
  m.impl("patch_gather", TORCH_BOX(&helios::bind_patch_gather));                 \
  m.impl("euler_step", TORCH_BOX(&helios::bind_euler_step));                     \
  m.impl("dmd_step", TORCH_BOX(&helios::bind_dmd_step));                         \
  m.impl("unipc_step", TORCH_BOX(&helios::bind_unipc_step));                     \
  m.impl("upsample_renoise", TORCH_BOX(&helios::bind_upsample_renoise));         \
  m.impl("cfg_combine", TORCH_BOX(&helios::bind_cfg_combine));                   \
  m.impl("channel_norm_silu", TORCH_BOX(&helios::bind_channel_norm_silu));       \
  m.impl("upsample_nearest", TORCH_BOX(&helios::bind_upsample_nearest));         \
  m.impl("bias_residual", TORCH_BOX(&helios::bind_bias_residual));               \
  m.impl("quantize_rows", TORCH_BOX(&helios::bind_quantize_rows));               \
  m.impl("quantize_heads", TORCH_BOX(&helios::bind_quantize_heads));

STABLE_TORCH_LIBRARY_IMPL(helios, CPU, m){HELIOS_IMPL(m)}
#ifdef HELIOS_CUDA
STABLE_TORCH_LIBRARY_IMPL(helios, CUDA, m) {
  HELIOS_IMPL(m)
}
#endif
