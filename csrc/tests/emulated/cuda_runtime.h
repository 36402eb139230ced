// As much of CUDA's runtime as our kernels use, for a host compiler: the very .cu files run on the
// CPU, one block after the other, every thread of a block on a stack of its own. Threads change
// places only at barriers and shuffles, and one warp after the other goes as far as the block's
// next barrier, in an order drawn anew each time: code that needs a barrier it lacks gives
// different results from run to run; a barrier not reached by all ends the program with a message.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned columns = 1, unsigned rows = 1, unsigned planes = 1)
      : x(columns), y(rows), z(planes) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
float __shfl_xor_sync(unsigned mask, float value, int lanes);

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
using std::isinf;
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace emulated {
cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  return emulated::run_grid(*config, [&] { kernel(args...); });
}

cudaError_t cudaGetLastError();  // and forgets it
