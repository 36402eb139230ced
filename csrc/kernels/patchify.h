// Latents to the operands of the patch projections, and output rows back to latents with the
// solver's step taken on the way.

#pragma once

#include "types.h"

namespace helios {

struct Latents {
  void* data;
  std::int64_t strides[5];  // batch, channel, frame, row, column, in elements
};

// rows[b][i] = patch first_row + i, elements in (channel, t, h, w) order. A latent whose size is no
// multiple of the kernel is continued by repeating its last frame, row or column.
constexpr std::int64_t kMaxPatchWidth = 2048;  // columns of a patch

struct PatchGather {
  Latents latents;
  void* rows;  // [batch, num_rows, channels * t * h * w], contiguous
  std::int64_t batch, channels, size[3];
  std::int64_t kernel[3];
  std::int64_t first_row, num_rows;
  DType latents_dtype, rows_dtype;
};

// One step of a solver, in place. The velocity comes as output rows [batch, tokens, pt * ph * pw *
// channels], channel fastest; latents are contiguous [batch, channels, frames, rows, columns].
// Which step it is and all its numbers are read from memory, so that a recorded launch serves every
// step.
struct SolverStep {
  enum class Rule : int {
    kEuler = 0,  // x += delta * v, in float32; a row is {delta}
    kDmd = 1,  // x0 = (the velocity's dtype)(x - sigma * v) in float64; x = x0 where sigma_next is
               // 0, else (1 - sigma_next) * x0 + sigma_next * start; a row is {sigma, sigma_next}
    kUniPC =
        2,  // x0 = x - sigma * v; base = x, or where the step corrects correct_base * base +
            // sum correct[i] * older[i] + correct_x0 * x0; x = predict_base * base + predict_x0
            // * x0 + sum predict[i] * older[i], in float32; a row is {sigma, corrects,
            // correct_base, correct_x0, correct[kept], predict_base, predict_x0, predict[kept]}
  };
  Rule rule;
  const void* velocity;        // of velocity_dtype
  void* latents;               // of latents_dtype
  const double* coefficients;  // a row per step
  const std::int64_t* index;   // the step to take
  const void* start;           // kDmd: of latents_dtype
  float* base;                 // kUniPC: of the step before; becomes this step's
  float* history;              // kUniPC: [kept, elements]; step s has its x0 in place s % kept, and
                               // older[i] is the one of step index - 1 - i
  int kept;
  std::int64_t batch, channels, size[3];  // of the latents
  std::int64_t patch[3];
  DType velocity_dtype, latents_dtype;
};

void patch_gather_cpu(const PatchGather& args) noexcept;
int patch_gather_cuda(const PatchGather& args, void* stream) noexcept;
void solver_step_cpu(const SolverStep& args) noexcept;
int solver_step_cuda(const SolverStep& args, void* stream) noexcept;

}  // namespace helios
