// What the bindings share: from torch's tensors to the kernels' structs, checked once for both
// twins.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "../kernels/types.h"

// Named without STABLE_ by the releases before it was renamed (2.10 and 2.11).
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Absent in CPU builds of torch; found through libtorch in CUDA builds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace helios {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline void check_same(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(
      x.get_device_index() == other.get_device_index() && x.is_cuda() == other.is_cuda(), name,
      " must be on the same device");
}

inline void check_dtype(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
}

inline void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// A [batch, rows, width] tensor whose rows lie side by side.
inline Rows rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [batch, rows, width], got ", x.dim(),
                  " dimensions");
  STD_TORCH_CHECK(x.size(2) <= 1 || x.stride(2) == 1, name,
                  " must have rows whose elements lie side by side");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

inline void check_shape(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(x.dim() == other.dim(), name, " must have as many dimensions");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(x.size(d) == other.size(d), name, " must have size ", x.size(d),
                    " in dimension ", d, ", got ", other.size(d));
  }
}

// The sum of what each rank of an exchange holds.
inline int64_t sum_of_shares(const std::vector<int64_t>& shares) {
  int64_t total = 0;
  for (int64_t count : shares) {
    STD_TORCH_CHECK(count >= 0, "heads must not be negative, got ", count);
    total += count;
  }
  return total;
}

inline void check_numel(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.numel() == count, name, " must hold ", count, " elements, got ", x.numel());
}

// Runs the twin for the device the tensor lies on; a CUDA kernel is enqueued on the current stream.
template <typename Args>
using CudaTwin = int (*)(const Args&, void*) noexcept;

template <typename Args>
void launch(const Tensor& where, const Args& args, void (*cpu)(const Args&) noexcept,
            std::common_type_t<CudaTwin<Args>> cuda) {
  if (where.is_cpu()) {
    cpu(args);
    return;
  }
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  const int status = cuda(args, stream);
  STD_TORCH_CHECK(status == 0, "the kernel could not be launched: CUDA error ", status);
}

#ifdef HELIOS_CUDA
#define HELIOS_TWINS(op) op##_cpu, op##_cuda
#else
#define HELIOS_TWINS(op) op##_cpu, nullptr
#endif

}  // namespace helios
