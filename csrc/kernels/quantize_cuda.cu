#include <cuda_fp8.h>

#include "cuda.cuh"
#include "quantize.h"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 320;
constexpr int kWarps = kThreads / 32;

// The larger one, or NaN where one of them is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// The block's largest value on all threads. scratch holds a float per warp.
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

// One block per row, which is read twice; the second time it comes from the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_vectors(const QuantizeRows args) {
  __shared__ float scratch[kWarps];
  constexpr int kSize = Vector<T>::kSize;
  const int64_t total = args.batch * args.rows;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    std::uint8_t* out = args.out + index * args.width;
    Vector<T> part;
    float top = 0.0f;
    for (int64_t i = threadIdx.x * kSize; i < args.width; i += kThreads * kSize) {
      part.load(x + i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) top = larger(fabsf(part.values[k]), top);
    }
    top = block_top(top, scratch);
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x * kSize; i < args.width; i += kThreads * kSize) {
      part.load(x + i);
      std::uint16_t pairs[kSize / 2];
#pragma unroll
      for (int k = 0; k < kSize; k += 2)
        pairs[k / 2] = e4m3_pair(part.values[k] * factor, part.values[k + 1] * factor);
      if constexpr (kSize == 8) {
        uint2 bits;
        memcpy(&bits, pairs, sizeof bits);
        *reinterpret_cast<uint2*>(out + i) = bits;
      } else {
        std::uint32_t bits;
        memcpy(&bits, pairs, sizeof bits);
        *reinterpret_cast<std::uint32_t*>(out + i) = bits;
      }
    }
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_any(const QuantizeRows args) {
  __shared__ float scratch[kWarps];
  const int64_t total = args.batch * args.rows;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    std::uint8_t* out = args.out + index * args.width;
    float top = 0.0f;
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads)
      top = larger(fabsf(to_float(x[i])), top);
    top = block_top(top, scratch);
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads)
      out[i] = static_cast<std::uint8_t>(e4m3_pair(to_float(x[i]) * factor, 0.0f) & 0xff);
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T>
int run(const QuantizeRows& args, cudaStream_t stream) {
  const int blocks = grid_for(args.batch * args.rows);
  const bool fits = args.width % Vector<T>::kSize == 0 && has_aligned_rows(args.x, sizeof(T)) &&
                    is_aligned(args.out);
  if (fits) {
    launch(quantize_vectors<T>, blocks, kThreads, stream, args);
  } else {
    launch(quantize_any<T>, blocks, kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int quantize_rows_cuda(const QuantizeRows& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
