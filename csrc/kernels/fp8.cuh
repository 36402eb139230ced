// Rows in e4m3 on a GPU, a block each.

#pragma once

#include <cuda_fp8.h>

#include "cuda.cuh"
#include "quantize.h"

namespace helios {

// The larger one, or NaN where one of them is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// The block's largest value on all threads. scratch holds a float per warp, of which there
// are kWarps.
template <int kWarps>
__device__ __forceinline__ float block_top(float value, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = larger(value, scratch[warp]);
  __syncthreads();  // all have read before the next row writes
  return value;
}

__device__ __forceinline__ std::uint16_t e4m3_pair(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

// Eight or four numbers in a store each.
template <int kSize>
__device__ __forceinline__ void store_e4m3(std::uint8_t* out, const float* values, float factor) {
  std::uint16_t pairs[kSize / 2];
#pragma unroll
  for (int k = 0; k < kSize; k += 2)
    pairs[k / 2] = e4m3_pair(values[k] * factor, values[k + 1] * factor);
  if constexpr (kSize == 8) {
    uint2 bits;
    memcpy(&bits, pairs, sizeof bits);
    *reinterpret_cast<uint2*>(out) = bits;
  } else {
    std::uint32_t bits;
    memcpy(&bits, pairs, sizeof bits);
    *reinterpret_cast<std::uint32_t*>(out) = bits;
  }
}

}  // namespace helios
