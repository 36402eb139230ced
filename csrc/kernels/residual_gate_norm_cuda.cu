#include "fp8.cuh"
#include "residual_gate_norm.h"

namespace helios {
namespace {

// Few threads with forty elements each: what a block's sum costs is spent once per row and warp.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWidth = 5120;

// One block per row, which stays in registers. All of it is read before anything is written.
template <typename T, bool kEightBits>
__global__ void __launch_bounds__(kThreads)
    residual_gate_norm_registers(const ResidualGateNorm args) {
  constexpr int kSize = Vector<T>::kSize, kVectors = kWidth / kThreads / kSize;
  __shared__ float scratch[3][kWarps];
  const int first = threadIdx.x * kSize;
  for (std::int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
      const std::int64_t segment = row < args.num_history ? 0 : 1;
      T* x_row = row_at<T>(args.x, batch, row) + first;
      Vector<T> x[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[v].load(x_row + v * kThreads * kSize);
      if (args.y.data != nullptr) {
        const T* y_row = row_at<T>(args.y, batch, row) + first;
        uint4 y_bits[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) y_bits[v] = load_bits(y_row + v * kThreads * kSize);
        const float* gates =
            args.gate == nullptr ? nullptr : args.gate + segment * args.gate_stride + first;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> y;
          y.set(y_bits[v]);
          if (gates != nullptr) {
            float gate[kSize];
            load_floats<kSize>(gate, gates + v * kThreads * kSize);
#pragma unroll
            for (int i = 0; i < kSize; ++i)
              x[v].values[i] = multiply_add<T>(y.values[i], gate[i], x[v].values[i]);
          } else {
#pragma unroll
            for (int i = 0; i < kSize; ++i) x[v].values[i] += y.values[i];
          }
          const uint4 bits = x[v].bits();
          store_bits(x_row + v * kThreads * kSize, bits);
          x[v].set(bits);
        }
      }
      if (args.out.data == nullptr) continue;
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum += x[v].values[i];
      }
      const float mean = block_sum<kWarps>(sum, scratch[0]) * (1.0f / kWidth);
      float squares = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          x[v].values[i] -= mean;
          squares = __fmaf_rn(x[v].values[i], x[v].values[i], squares);
        }
      }
      const float inverse_std =
          rsqrtf(block_sum<kWarps>(squares, scratch[1]) * (1.0f / kWidth) + args.eps);
      const float* weights = args.weight + segment * args.weight_stride + first;
      const float* biases = args.bias + segment * args.bias_stride + first;
      uint4 normed[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float weight[kSize], bias[kSize];
        load_floats<kSize>(weight, weights + v * kThreads * kSize);
        load_floats<kSize>(bias, biases + v * kThreads * kSize);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[v].values[i] = multiply_add<T>(x[v].values[i] * inverse_std, weight[i], bias[i]);
        normed[v] = x[v].bits();
      }
      if constexpr (kEightBits) {
        const float top = block_top<kWarps>(top_of<T>(normed), scratch[2]);
        const float scale = top < kLeastTop ? kLeastTop : top;
        std::uint8_t* out = row_at<std::uint8_t>(args.out, batch, row) + first;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          x[v].set(normed[v]);
          store_e4m3<kSize>(out + v * kThreads * kSize, x[v].values, kLargestE4m3 / scale);
        }
        if (threadIdx.x == 0) *row_at<float>(args.scale, batch, row) = scale / kLargestE4m3;
      } else {
        T* out = row_at<T>(args.out, batch, row) + first;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) store_bits(out + v * kThreads * kSize, normed[v]);
      }
    }
  }
}

// Any width and alignment: the row is read again for each pass.
template <typename T>
__global__ void __launch_bounds__(kThreads) residual_gate_norm_any(const ResidualGateNorm args) {
  __shared__ float scratch[3][kWarps];
  const std::int64_t total = args.batch * args.rows;
  for (std::int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const std::int64_t batch = index / args.rows, row = index % args.rows;
    const std::int64_t segment = row < args.num_history ? 0 : 1;
    T* x = row_at<T>(args.x, batch, row);
    const T* y = args.y.data == nullptr ? nullptr : row_at<T>(args.y, batch, row);
    float sum = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) {
      float value = to_float(x[i]);
      if (y != nullptr) {
        const float gate = args.gate == nullptr ? 1.0f : args.gate[segment * args.gate_stride + i];
        value = rounded<T>(value + to_float(y[i]) * gate);
        x[i] = from_float<T>(value);
      }
      sum += value;
    }
    if (args.out.data == nullptr) continue;
    __syncthreads();  // what other threads wrote to x is read below
    const float mean = block_sum<kWarps>(sum, scratch[0]) / static_cast<float>(args.width);
    float squares = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) {
      const float distance = to_float(x[i]) - mean;
      squares += distance * distance;
    }
    const float inverse_std =
        rsqrtf(block_sum<kWarps>(squares, scratch[1]) / static_cast<float>(args.width) + args.eps);
    const float* weight = args.weight + segment * args.weight_stride;
    const float* bias = args.bias + segment * args.bias_stride;
    const auto normed = [=](std::int64_t i) {
      return from_float<T>((to_float(x[i]) - mean) * inverse_std * weight[i] + bias[i]);
    };
    if (args.scale.data == nullptr) {
      T* out = row_at<T>(args.out, batch, row);
      for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) out[i] = normed(i);
      continue;
    }
    float top = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads)
      top = larger(fabsf(to_float(normed(i))), top);
    top = block_top<kWarps>(top, scratch[2]);
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    std::uint8_t* out = row_at<std::uint8_t>(args.out, batch, row);
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads)
      out[i] = static_cast<std::uint8_t>(e4m3_pair(to_float(normed(i)) * factor, 0.0f) & 0xff);
    if (threadIdx.x == 0) *row_at<float>(args.scale, batch, row) = top / kLargestE4m3;
  }
}

template <typename T>
bool fits_vectors(const ResidualGateNorm& args) {
  bool fits = args.width == kWidth && has_aligned_rows(args.x, sizeof(T));
  if (args.y.data != nullptr) fits = fits && has_aligned_rows(args.y, sizeof(T));
  if (args.gate != nullptr) fits = fits && is_aligned(args.gate) && args.gate_stride % 4 == 0;
  if (args.out.data != nullptr) {
    fits = fits && has_aligned_rows(args.out, args.scale.data == nullptr ? sizeof(T) : 1) &&
           is_aligned(args.weight) && is_aligned(args.bias) && args.weight_stride % 4 == 0 &&
           args.bias_stride % 4 == 0;
  }
  return fits;
}

template <typename T>
int run(const ResidualGateNorm& args, cudaStream_t stream) {
  if (fits_vectors<T>(args)) {
    const dim3 blocks = grid_for(args.rows, args.batch);
    if (args.scale.data == nullptr) {
      launch(residual_gate_norm_registers<T, false>, blocks, kThreads, stream, args);
    } else {
      launch(residual_gate_norm_registers<T, true>, blocks, kThreads, stream, args);
    }
  } else {
    const int blocks = grid_for(args.batch * args.rows);
    launch(residual_gate_norm_any<T>, blocks, kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int residual_gate_norm_cuda(const ResidualGateNorm& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
