// Which instruction set the CPU twins use, decided once. HELIOS_CPU_ISA=baseline|avx2|avx512 asks
// for a lesser one.

#include <cstdlib>
#include <cstring>

#include "attention_parts.h"
#include "isa.h"
#include "latents.h"
#include "patchify.h"
#include "qk_rmsnorm_rope.h"
#include "quantize.h"
#include "quantize_heads.h"
#include "residual_gate_norm.h"
#include "vae.h"

namespace helios {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa best() {
#ifdef HELIOS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const Isa found = best();
  const char* wanted = std::getenv("HELIOS_CPU_ISA");
  if (wanted == nullptr) return found;
  if (std::strcmp(wanted, "baseline") == 0) return Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0 && found != Isa::kBaseline) return Isa::kAvx2;
  return found;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_isa() noexcept {
  return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : "baseline";
}

#ifdef HELIOS_X86
#define HELIOS_DISPATCH(op, Args)               \
  namespace baseline {                          \
  void op(const Args& args) noexcept;           \
  }                                             \
  namespace avx2 {                              \
  void op(const Args& args) noexcept;           \
  }                                             \
  namespace avx512 {                            \
  void op(const Args& args) noexcept;           \
  }                                             \
  void op##_cpu(const Args& args) noexcept {    \
    isa() == Isa::kAvx512 ? avx512::op(args)    \
    : isa() == Isa::kAvx2 ? avx2::op(args)      \
                          : baseline::op(args); \
  }
#else
#define HELIOS_DISPATCH(op, Args)     \
  namespace baseline {                \
  void op(const Args& args) noexcept; \
  }                                   \
  void op##_cpu(const Args& args) noexcept { baseline::op(args); }
#endif

HELIOS_DISPATCH(residual_gate_norm, ResidualGateNorm)
HELIOS_DISPATCH(qk_rmsnorm_rope, QkRmsnormRope)
HELIOS_DISPATCH(rmsnorm_rows, RmsnormRows)
HELIOS_DISPATCH(unpack_heads, UnpackHeads)
HELIOS_DISPATCH(merge_partials, MergePartials)
HELIOS_DISPATCH(patch_gather, PatchGather)
HELIOS_DISPATCH(solver_step, SolverStep)
HELIOS_DISPATCH(upsample_renoise, UpsampleRenoise)
HELIOS_DISPATCH(cfg_combine, CfgCombine)
HELIOS_DISPATCH(channel_norm_silu, ChannelNormSilu)
HELIOS_DISPATCH(upsample_nearest, UpsampleNearest)
HELIOS_DISPATCH(bias_residual, BiasResidual)
HELIOS_DISPATCH(quantize_rows, QuantizeRows)
HELIOS_DISPATCH(quantize_heads, QuantizeHeads)

}  // namespace helios
