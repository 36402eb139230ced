#include <climits>

#include "cuda.cuh"
#include "latents.h"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 256;

inline int blocks_for(int64_t items) { return grid_for((items + kThreads - 1) / kThreads); }

// One thread per source element; it writes a block of 2 x 2.
template <typename X, typename N, typename O>
__global__ void __launch_bounds__(kThreads) upsample(const UpsampleRenoise args) {
  const int64_t total = args.planes * args.rows * args.columns;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t line = index / args.columns, column = index % args.columns;
    const float x = rounded<X>(args.alpha * to_float(static_cast<const X*>(args.x)[index]));
    const float4 draw = *reinterpret_cast<const float4*>(args.draws + 4 * index);
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const float4 row = *reinterpret_cast<const float4*>(args.factor + 4 * place);
      const float sum = draw.x * row.x + draw.y * row.y + draw.z * row.z + draw.w * row.w;
      const float noise = rounded<N>(args.beta * rounded<N>(sum));
      const int64_t target = (2 * line + place / 2) * 2 * args.columns + 2 * column + place % 2;
      static_cast<O*>(args.out)[target] = from_float<O>(x + noise);
    }
  }
}

template <typename N>
int run_upsample(const UpsampleRenoise& args, cudaStream_t stream) {
  if (!is_aligned(args.draws) || !is_aligned(args.factor))
    return static_cast<int>(cudaErrorMisalignedAddress);
  const int blocks = blocks_for(args.planes * args.rows * args.columns);
  if (args.x_dtype == DType::kFloat32) {
    launch(upsample<float, N, float>, blocks, kThreads, stream, args);
  } else {
    launch(upsample<N, N, N>, blocks, kThreads, stream, args);
  }
  return finish();
}

__device__ double block_sum_double(double value, double* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (unsigned step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) scratch[threadIdx.x] += scratch[threadIdx.x + step];
    __syncthreads();
  }
  const double sum = scratch[0];
  __syncthreads();
  return sum;
}

// Partial sums of one part of one sample; the same parts and the same order in every run.
template <typename T>
__global__ void __launch_bounds__(kThreads) sums(const CfgCombine args) {
  __shared__ double scratch[kThreads];
  const int64_t sample = blockIdx.x / kCfgBlocks, block = blockIdx.x % kCfgBlocks;
  const int64_t size = (args.count + kCfgBlocks - 1) / kCfgBlocks;
  const int64_t end = min((block + 1) * size, args.count);
  const T* positive = static_cast<const T*>(args.positive) + sample * args.count;
  const T* negative = static_cast<const T*>(args.negative) + sample * args.count;
  double dot = 0.0, square = 0.0;
  for (int64_t i = block * size + threadIdx.x; i < end; i += kThreads) {
    const double c = to_float(positive[i]), u = to_float(negative[i]);
    dot += c * u;
    square += u * u;
  }
  dot = block_sum_double(dot, scratch);
  square = block_sum_double(square, scratch);
  if (threadIdx.x == 0) {
    args.workspace[2 * blockIdx.x] = dot;
    args.workspace[2 * blockIdx.x + 1] = square;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) combine(const CfgCombine args) {
  const int64_t total = args.batch * args.count;
  int64_t sample_of_factor = -1;
  float factor = 1.0f;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t sample = i / args.count;
    if (args.zero_star && sample != sample_of_factor) {
      double dot = 0.0, square = 0.0;
      for (int64_t block = 0; block < kCfgBlocks; ++block) {
        dot += args.workspace[2 * (sample * kCfgBlocks + block)];
        square += args.workspace[2 * (sample * kCfgBlocks + block) + 1];
      }
      factor = rounded<T>(static_cast<float>(dot) / (static_cast<float>(square) + 1e-8f));
      sample_of_factor = sample;
    }
    float base = to_float(static_cast<const T*>(args.negative)[i]);
    if (args.zero_star) base = rounded<T>(base * factor);
    const float difference = rounded<T>(to_float(static_cast<const T*>(args.positive)[i]) - base);
    static_cast<T*>(args.out)[i] = from_float<T>(base + rounded<T>(args.scale * difference));
  }
}

template <typename T>
int run_combine(const CfgCombine& args, cudaStream_t stream) {
  if (args.zero_star) {
    if (args.batch > INT_MAX / kCfgBlocks) return static_cast<int>(cudaErrorInvalidValue);
    launch(sums<T>, static_cast<int>(args.batch * kCfgBlocks), kThreads, stream, args);
  }
  launch(combine<T>, blocks_for(args.batch * args.count), kThreads, stream, args);
  return finish();
}

}  // namespace

int upsample_renoise_cuda(const UpsampleRenoise& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.noise_dtype, run_upsample, args, static_cast<cudaStream_t>(stream))
}

int cfg_combine_cuda(const CfgCombine& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_combine, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
