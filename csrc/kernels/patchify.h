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
struct PatchGather {
  Latents latents;
  void* rows;  // [batch, num_rows, channels * t * h * w], contiguous
  std::int64_t batch, channels, size[3];
  std::int64_t kernel[3];
  std::int64_t first_row, num_rows;
  DType latents_dtype, rows_dtype;
};

constexpr int kMaxHistory = 4;

// One step of a solver. The velocity comes as output rows [batch, tokens, pt * ph * pw * channels],
// channel fastest; latents and outputs are contiguous [batch, channels, frames, rows, columns].
// velocity may be null: it is zero then.
struct SolverStep {
  enum class Rule : int {
    kEuler = 0,  // out = x + scale * v, in float32
    kDmd = 1,    // x0 = dtype(x - sigma * v) in float64; out = x0, or (1 - scale) * x0 + scale *
                 // start in float64
    kUniPC = 2,  // see below, in float32
  };
  Rule rule;
  const void* velocity;  // of velocity_dtype
  const void* latents;   // of latents_dtype
  void* out;             // of out_dtype
  const void* start;     // kDmd: of out_dtype, or null at a stage's last step
  double sigma, scale;
  // kUniPC: x0 = x - sigma * v; base = x, or correct_base * previous_base + sum correct[i] *
  // history[i] + correct_current * x0; out = predict_base * base + predict[0] * x0 + sum predict[i
  // + 1] * history[i]. x0 and base are written for the next step.
  float* x0;
  float* base;
  const float* previous_base;         // null without a corrector
  const float* history[kMaxHistory];  // x0 of earlier steps, newest first
  float correct[kMaxHistory], predict[kMaxHistory + 1];
  float correct_base, correct_current, predict_base;
  int num_history;
  std::int64_t batch, channels, size[3];  // of the latents
  std::int64_t patch[3];
  DType velocity_dtype, latents_dtype, out_dtype;
};

void patch_gather_cpu(const PatchGather& args) noexcept;
int patch_gather_cuda(const PatchGather& args, void* stream) noexcept;
void solver_step_cpu(const SolverStep& args) noexcept;
int solver_step_cuda(const SolverStep& args, void* stream) noexcept;

}  // namespace helios
