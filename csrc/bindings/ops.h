// The functions behind the schemas of ops.cpp, in its order.

#pragma once

#include "check.h"

namespace helios {

using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

void bind_residual_gate_norm(const Tensor x, const MaybeTensor y, const MaybeTensor gate,
                             const MaybeTensor weight, const MaybeTensor bias,
                             const MaybeTensor out, const MaybeTensor scale, int64_t num_history,
                             double eps);
void bind_qk_rmsnorm_rope(const Tensor qkv, const Tensor q_weight, const Tensor k_weight,
                          const Tensor rotation, const MaybeTensor history_scale,
                          int64_t num_history, int64_t first_query, double eps);
void bind_qk_rmsnorm_rope_pack(const Tensor qkv, const Tensor q_weight, const Tensor k_weight,
                               const Tensor rotation, const MaybeTensor history_scale,
                               const Tensor packed, const Ints heads, int64_t num_history,
                               int64_t first_query, double eps);
void bind_rmsnorm_rows(const Tensor x, const Tensor weight, double eps);
void bind_unpack_heads(const Tensor received, const Tensor out, const Ints heads);
void bind_merge_partials(const Tensor out, const Tensor lse, const Tensor other,
                         const Tensor other_lse);
void bind_patch_gather(const Tensor latents, const Tensor rows, const Ints kernel,
                       int64_t first_row);
void bind_euler_step(const Tensor latents, const Tensor velocity, const Tensor coefficients,
                     const Tensor index, const Ints patch);
void bind_dmd_step(const Tensor latents, const Tensor velocity, const Tensor start,
                   const Tensor coefficients, const Tensor index, const Ints patch);
void bind_unipc_step(const Tensor latents, const Tensor velocity, const Tensor history,
                     const Tensor base, const Tensor coefficients, const Tensor index,
                     const Ints patch);
void bind_upsample_renoise(const Tensor x, const Tensor draws, const Tensor factor,
                           const Tensor out, double alpha, double beta, bool noise_is_wide);
void bind_cfg_combine(const Tensor positive, const Tensor negative, const Tensor out,
                      const MaybeTensor workspace, double scale);
void bind_channel_norm_silu(const Tensor x, const Tensor gamma, const MaybeTensor bias,
                            const MaybeTensor residual, const Tensor out, bool silu);
void bind_upsample_nearest(const Tensor x, const MaybeTensor bias, const MaybeTensor residual,
                           const Tensor out);
void bind_bias_residual(const Tensor x, const MaybeTensor bias, const MaybeTensor residual,
                        const Tensor out);
void bind_quantize_rows(const Tensor x, const Tensor out, const Tensor scale, bool gelu);
void bind_quantize_heads(const Tensor q, const Tensor k, const Tensor v, const Tensor q_out,
                         const Tensor k_out, const Tensor v_out, const Tensor q_scale,
                         const Tensor k_scale, const Tensor v_scale, const Tensor workspace);

}  // namespace helios
