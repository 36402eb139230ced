// Rows in e4m3 on a GPU, a block each.

#pragma once

#include <cuda_fp8.h>

#include "cuda.cuh"
#include "quantize.h"

namespace helios {

// The larger one, or NaN where one of them is.
__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// The block's largest value on all threads. scratch holds a float per warp and must not be that of
// the block's reduction before, see block_sum.
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
  return value;
}

// The largest magnitude among a thread's numbers.
template <typename T, int kVectors>
__device__ __forceinline__ float top_of(const uint4 (&vectors)[kVectors]) {
  if constexpr (sizeof(T) == 4) {
    float top = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> x;
      x.set(vectors[v]);
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i) top = larger(top, fabsf(x.values[i]));
    }
    return top;
  } else {
    // Magnitudes would take an instruction more for each pair.
    std::uint32_t most = vectors[0].x, least = vectors[0].x;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::uint32_t words[4] = {vectors[v].x, vectors[v].y, vectors[v].z, vectors[v].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        most = larger_of_pairs<T>(most, words[i]);
        least = smaller_of_pairs<T>(least, words[i]);
      }
    }
    return larger(larger(fabsf(Pair<T>::low(most)), fabsf(Pair<T>::low(least))),
                  larger(fabsf(Pair<T>::high(most)), fabsf(Pair<T>::high(least))));
  }
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
