// What every operator's contract uses. Standard headers only: kernels know nothing of torch.

#pragma once

#include <cstdint>

namespace helios {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of a tensor [batch, rows, width]: where a row begins, in elements. Elements of a row lie
// side by side.
struct Rows {
  void* data;
  std::int64_t batch_stride, row_stride;
};

}  // namespace helios
