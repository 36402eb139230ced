#include "fp8.cuh"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 320;
constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ __forceinline__ float tanh_gelu(float x) {
  return rounded<T>(0.5f * x * (1.0f + tanhf(kGeluBeta * (x + kGeluKappa * (x * x * x)))));
}

// One block per row, which is read twice; the second time it comes from the cache.
template <typename T, bool kGelu>
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
      for (int k = 0; k < kSize; ++k) {
        if (kGelu) part.values[k] = tanh_gelu<T>(part.values[k]);
        top = larger(fabsf(part.values[k]), top);
      }
    }
    top = block_top<kWarps>(top, scratch);
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x * kSize; i < args.width; i += kThreads * kSize) {
      part.load(x + i);
#pragma unroll
      for (int k = 0; kGelu && k < kSize; ++k) part.values[k] = tanh_gelu<T>(part.values[k]);
      store_e4m3<kSize>(out + i, part.values, factor);
    }
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T, bool kGelu>
__global__ void __launch_bounds__(kThreads) quantize_any(const QuantizeRows args) {
  __shared__ float scratch[kWarps];
  const int64_t total = args.batch * args.rows;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    std::uint8_t* out = args.out + index * args.width;
    float top = 0.0f;
    const auto value = [x](int64_t i) {
      return kGelu ? tanh_gelu<T>(to_float(x[i])) : to_float(x[i]);
    };
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads) top = larger(fabsf(value(i)), top);
    top = block_top<kWarps>(top, scratch);
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads)
      out[i] = static_cast<std::uint8_t>(e4m3_pair(value(i) * factor, 0.0f) & 0xff);
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T, bool kGelu>
int run_with(const QuantizeRows& args, cudaStream_t stream) {
  const int blocks = grid_for(args.batch * args.rows);
  const bool fits = args.width % Vector<T>::kSize == 0 && has_aligned_rows(args.x, sizeof(T)) &&
                    is_aligned(args.out);
  if (fits) {
    launch(quantize_vectors<T, kGelu>, blocks, kThreads, stream, args);
  } else {
    launch(quantize_any<T, kGelu>, blocks, kThreads, stream, args);
  }
  return finish();
}

template <typename T>
int run(const QuantizeRows& args, cudaStream_t stream) {
  return args.gelu ? run_with<T, true>(args, stream) : run_with<T, false>(args, stream);
}

}  // namespace

int quantize_rows_cuda(const QuantizeRows& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
