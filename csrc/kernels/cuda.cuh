// Shared by the CUDA twins. Compiled with -fmad=false, so that products and sums round as the
// reference's do.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"

namespace helios {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

// torch rounds float64 to 16 bits through float32.
template <typename T>
__device__ __forceinline__ T from_double(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T>
__device__ __forceinline__ T* row_at(const Rows& rows, std::int64_t batch, std::int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// Sixteen bytes at a time. A struct assigned as a whole would compile to 32-bit accesses, hence the
// copy through uint4; and the compiler splits some stores of a uint4 into words, hence the
// instruction by name.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  float values[kSize];

  __device__ __forceinline__ void load(const T* from) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    T parts[kSize];
    memcpy(parts, &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(parts[i]);
  }

  __device__ __forceinline__ void store(T* to) const {
    T parts[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) parts[i] = from_float<T>(values[i]);
    uint4 bits;
    memcpy(&bits, parts, sizeof bits);
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = bits;
#endif
  }
};

// kSize float32 values from 16-byte aligned memory.
template <int kSize>
__device__ __forceinline__ void load_floats(float* to, const float* from) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const float4 part = *reinterpret_cast<const float4*>(from + i);
    to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
  }
}

// The sum over the block's threads, on all of them, in a fixed order. scratch holds 33 floats; two
// barriers keep the next sum off it: the first until all have read this one's result, the second
// until the first warp has read its parts.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < (blockDim.x + 31) / 32 ? scratch[lane] : 0.0f;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0) scratch[32] = value;
  }
  __syncthreads();
  return scratch[32];
}

inline bool is_aligned(const void* x) { return reinterpret_cast<std::uintptr_t>(x) % 16 == 0; }

// True where every row starts on sixteen bytes.
inline bool has_aligned_rows(const Rows& rows, std::int64_t element_size) {
  return is_aligned(rows.data) && rows.batch_stride * element_size % 16 == 0 &&
         rows.row_stride * element_size % 16 == 0;
}

#ifndef HELIOS_MAX_GRID
#define HELIOS_MAX_GRID (1 << 20)
#endif
// Kernels stride over what a grid of this size does not cover.
constexpr int kMaxGridBlocks = HELIOS_MAX_GRID;

inline int grid_for(std::int64_t items) {
  return static_cast<int>(items < kMaxGridBlocks ? items : kMaxGridBlocks);
}

// Enqueues one kernel; finish() says whether it could be.
template <typename... Params>
void launch(void (*kernel)(Params...), int blocks, int threads, cudaStream_t stream,
            const std::common_type_t<Params>&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  (void)cudaLaunchKernelEx(&config, kernel, args...);
}

inline int finish() { return static_cast<int>(cudaGetLastError()); }

#define HELIOS_FOR_DTYPE(dtype, run, args, stream) \
  switch (dtype) {                                 \
    case DType::kFloat32:                          \
      return run<float>(args, stream);             \
    case DType::kBFloat16:                         \
      return run<BFloat16>(args, stream);          \
    case DType::kFloat16:                          \
      return run<Float16>(args, stream);           \
  }                                                \
  return static_cast<int>(cudaErrorInvalidValue);

}  // namespace helios
