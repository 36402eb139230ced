// RMSNorm over the whole width, rotary embedding per head, and the amplification of history keys,
// on the rows of a fused QKV projection: in place, or copied into the send buffer of a head
// exchange; and plain RMSNorm of rows.

#pragma once

#include "types.h"

namespace helios {

struct QkRmsnormRope {
  Rows qkv;              // [batch, rows, 3 * width]: q | k | v side by side
  const void* q_weight;  // [width] of dtype
  const void* k_weight;  // [width]
  const float*
      rotation;  // [rows, head_dim / 2, 2]: cosine and sine of the pairs (2i, 2i + 1) of every head
  const float* history_scale;  // [heads] times the history rows' keys, or null
  std::int64_t batch, rows, width, head_dim, num_history;
  std::int64_t first_query;  // queries of earlier rows are neither read nor written
  float eps;
  DType dtype;
  // Where q, k and v go instead, or null: destination by destination, [rows][batch][3][heads of
  // it][head_dim]. Queries of rows before first_query are left as they are there.
  void* packed;
  const std::int64_t* heads_per_destination;  // host memory
  int num_destinations;
};

struct RmsnormRows {
  Rows x;              // [batch, rows, width] in and out
  const void* weight;  // [width] of dtype
  std::int64_t batch, rows, width;
  float eps;
  DType dtype;
};

// Roundings: the norm in float32, to dtype; the rotation in float32, to dtype; the scaled key once
// more.
void qk_rmsnorm_rope_cpu(const QkRmsnormRope& args) noexcept;
int qk_rmsnorm_rope_cuda(const QkRmsnormRope& args, void* stream) noexcept;
void rmsnorm_rows_cpu(const RmsnormRows& args) noexcept;
int rmsnorm_rows_cuda(const RmsnormRows& args, void* stream) noexcept;

}  // namespace helios
