// What surrounds attention over several ranks: bringing exchanged heads back into rows, and merging
// partial results.

#pragma once

#include "types.h"

namespace helios {

// received: source by source, [rows][batch][heads of it][head_dim]; out: [batch, rows, all heads,
// head_dim], contiguous.
struct UnpackHeads {
  const void* received;
  void* out;
  const std::int64_t* heads_per_source;  // host memory
  int num_sources;
  std::int64_t batch, rows, head_dim;
  std::int64_t element_size;
};

// Folds a second partial, over other keys, into the first. lse is the natural logarithm of the sum
// of exponentials; -inf saw no key and contributes nothing. Source: FlashAttention-2 (arXiv
// 2307.08691), section 3.1.
struct MergePartials {
  float* out;              // [rows, dim] in and out
  float* lse;              // [rows] in and out
  const void* other;       // [rows, dim] of dtype
  const float* other_lse;  // [rows]
  std::int64_t rows, dim;
  DType dtype;
};

void unpack_heads_cpu(const UnpackHeads& args) noexcept;
int unpack_heads_cuda(const UnpackHeads& args, void* stream) noexcept;
void merge_partials_cpu(const MergePartials& args) noexcept;
int merge_partials_cuda(const MergePartials& args, void* stream) noexcept;

}  // namespace helios
