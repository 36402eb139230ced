// Takes dispatch.cpp's place: what asks for a CPU twin gets the CUDA kernel, emulated.

#include <cstdio>
#include <cstdlib>

#include "../../kernels/attention_parts.h"
#include "../../kernels/isa.h"
#include "../../kernels/latents.h"
#include "../../kernels/patchify.h"
#include "../../kernels/qk_rmsnorm_rope.h"
#include "../../kernels/quantize.h"
#include "../../kernels/quantize_heads.h"
#include "../../kernels/residual_gate_norm.h"
#include "../../kernels/vae.h"

namespace helios {

const char* cpu_isa() noexcept { return "emulated CUDA"; }

#define HELIOS_EMULATE(op, Args)                                       \
  void op##_cpu(const Args& args) noexcept {                           \
    const int status = op##_cuda(args, nullptr);                       \
    if (status == 0) return;                                           \
    std::fprintf(stderr, #op " was refused: CUDA error %d\n", status); \
    std::abort();                                                      \
  }

HELIOS_EMULATE(residual_gate_norm, ResidualGateNorm)
HELIOS_EMULATE(qk_rmsnorm_rope, QkRmsnormRope)
HELIOS_EMULATE(rmsnorm_rows, RmsnormRows)
HELIOS_EMULATE(unpack_heads, UnpackHeads)
HELIOS_EMULATE(merge_partials, MergePartials)
HELIOS_EMULATE(patch_gather, PatchGather)
HELIOS_EMULATE(solver_step, SolverStep)
HELIOS_EMULATE(upsample_renoise, UpsampleRenoise)
HELIOS_EMULATE(cfg_combine, CfgCombine)
HELIOS_EMULATE(channel_norm_silu, ChannelNormSilu)
HELIOS_EMULATE(upsample_nearest, UpsampleNearest)
HELIOS_EMULATE(bias_residual, BiasResidual)
HELIOS_EMULATE(quantize_rows, QuantizeRows)
HELIOS_EMULATE(quantize_heads, QuantizeHeads)

}  // namespace helios
