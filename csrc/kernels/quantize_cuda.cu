#include "fp8.cuh"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 320;
constexpr int kWarps = kThreads / 32;

// tanh-GELU is x * sigmoid(2 u) with u = beta * (x + kappa * x^3); this way to about 1e-6 relative.
__device__ __forceinline__ float tanh_gelu(float x) {
  constexpr float kTwiceLog2e = 2.0f * 1.4426950408889634f;
  constexpr float kLinear = -kTwiceLog2e * kGeluBeta, kCubic = kLinear * kGeluKappa;
  return x * fast_reciprocal(1.0f + fast_exp2(x * __fmaf_rn(kCubic, x * x, kLinear)));
}

template <typename T>
__device__ __forceinline__ uint4 gelu_of(uint4 bits) {
  Vector<T> x;
  x.set(bits);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) x.values[i] = tanh_gelu(x.values[i]);
  return x.bits();
}

// One block per row, which stays in registers: read once, GELU taken once.
template <typename T, bool kGelu, int kRowWarps, int kVectors>
__global__ void __launch_bounds__(32 * kRowWarps) quantize_registers(const QuantizeRows args) {
  constexpr int kSize = Vector<T>::kSize, kStride = 32 * kRowWarps * kSize;
  constexpr int kWidth = kStride * kVectors;
  __shared__ float scratch[2][kRowWarps];
  int turn = 0;
  for (int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
      const T* x = row_at<T>(args.x, batch, row) + threadIdx.x * kSize;
      const int64_t index = batch * args.rows + row;
      std::uint8_t* out = args.out + index * kWidth + threadIdx.x * kSize;
      uint4 bits[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) bits[v] = load_bits(x + v * kStride);
#pragma unroll
      for (int v = 0; kGelu && v < kVectors; ++v) bits[v] = gelu_of<T>(bits[v]);
      const float top = block_top<kRowWarps>(top_of<T>(bits), scratch[turn]);
      turn ^= 1;
      const float scale = top < kLeastTop ? kLeastTop : top;
      const float factor = kLargestE4m3 / scale;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> values;
        values.set(bits[v]);
        store_e4m3<kSize>(out + v * kStride, values.values, factor);
      }
      if (threadIdx.x == 0) args.scale[index] = scale / kLargestE4m3;
    }
  }
}

// Other widths of whole vectors: the row is read twice, the second time from the cache.
template <typename T, bool kGelu>
__global__ void __launch_bounds__(kThreads) quantize_vectors(const QuantizeRows args) {
  __shared__ float scratch[2][kWarps];
  constexpr int kSize = Vector<T>::kSize;
  int turn = 0;
  const int64_t total = args.batch * args.rows;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    std::uint8_t* out = args.out + index * args.width;
    float top = 0.0f;
    for (int64_t i = threadIdx.x * kSize; i < args.width; i += kThreads * kSize) {
      uint4 bits[1] = {load_bits(x + i)};
      if (kGelu) bits[0] = gelu_of<T>(bits[0]);
      top = larger(top_of<T>(bits), top);
    }
    top = block_top<kWarps>(top, scratch[turn]);
    turn ^= 1;
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x * kSize; i < args.width; i += kThreads * kSize) {
      uint4 bits = load_bits(x + i);
      if (kGelu) bits = gelu_of<T>(bits);
      Vector<T> values;
      values.set(bits);
      store_e4m3<kSize>(out + i, values.values, factor);
    }
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T, bool kGelu>
__global__ void __launch_bounds__(kThreads) quantize_any(const QuantizeRows args) {
  __shared__ float scratch[2][kWarps];
  int turn = 0;
  const int64_t total = args.batch * args.rows;
  for (int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    std::uint8_t* out = args.out + index * args.width;
    float top = 0.0f;
    const auto value = [x](int64_t i) {
      return kGelu ? rounded<T>(tanh_gelu(to_float(x[i]))) : to_float(x[i]);
    };
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads) top = larger(fabsf(value(i)), top);
    top = block_top<kWarps>(top, scratch[turn]);
    turn ^= 1;
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t i = threadIdx.x; i < args.width; i += kThreads)
      out[i] = static_cast<std::uint8_t>(e4m3_pair(value(i) * factor, 0.0f) & 0xff);
    if (threadIdx.x == 0) args.scale[index] = top / kLargestE4m3;
  }
}

template <typename T, bool kGelu>
int run_with(const QuantizeRows& args, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize;
  const bool fits =
      args.width % kSize == 0 && has_aligned_rows(args.x, sizeof(T)) && is_aligned(args.out);
  const dim3 blocks = grid_for(args.rows, args.batch);
  if (fits && args.width == 5120) {
    launch(quantize_registers<T, kGelu, 4, 5120 / 128 / kSize>, blocks, 128, stream, args);
  } else if (fits && args.width == 13824) {
    launch(quantize_registers<T, kGelu, 9, 13824 / 288 / kSize>, blocks, 288, stream, args);
  } else if (fits) {
    launch(quantize_vectors<T, kGelu>, grid_for(args.batch * args.rows), kThreads, stream, args);
  } else {
    launch(quantize_any<T, kGelu>, grid_for(args.batch * args.rows), kThreads, stream, args);
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
