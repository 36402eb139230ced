#include "fp8.cuh"
#include "residual_gate_norm.h"

namespace helios {
namespace {

constexpr int kWarps = 10;
constexpr int kThreads = 32 * kWarps;  // 5120 elements are two vectors of eight 16-bit numbers each

// One block per row. kVectors > 0: the row is exactly kThreads * kVectors vectors and stays in
// registers.
template <typename T, int kVectors, bool kEightBits>
__global__ void __launch_bounds__(kThreads)
    residual_gate_norm_registers(const ResidualGateNorm args) {
  __shared__ float scratch[33];
  constexpr int kSize = Vector<T>::kSize;
  const std::int64_t total = args.batch * args.rows;
  for (std::int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const std::int64_t batch = index / args.rows, row = index % args.rows;
    const std::int64_t segment = row < args.num_history ? 0 : 1;
    T* x_row = row_at<T>(args.x, batch, row);
    Vector<T> x[kVectors];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * kThreads + threadIdx.x) * kSize;
      x[v].load(x_row + start);
      if (args.y.data != nullptr) {
        Vector<T> y;
        y.load(row_at<T>(args.y, batch, row) + start);
        float gate[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) gate[i] = 1.0f;
        if (args.gate != nullptr)
          load_floats<kSize>(gate, args.gate + segment * args.gate_stride + start);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[v].values[i] = rounded<T>(x[v].values[i] + y.values[i] * gate[i]);
        x[v].store(x_row + start);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += x[v].values[i];
    }
    if (args.out.data == nullptr) continue;
    const float mean = block_sum(sum, scratch) / static_cast<float>(args.width);
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float distance = x[v].values[i] - mean;
        squares += distance * distance;
      }
    }
    const float inverse_std =
        rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
    float top = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * kThreads + threadIdx.x) * kSize;
      float weight[kSize], bias[kSize];
      load_floats<kSize>(weight, args.weight + segment * args.weight_stride + start);
      load_floats<kSize>(bias, args.bias + segment * args.bias_stride + start);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float h = (x[v].values[i] - mean) * inverse_std * weight[i] + bias[i];
        x[v].values[i] = kEightBits ? rounded<T>(h) : h;
        if (kEightBits) top = larger(fabsf(x[v].values[i]), top);
      }
      if (!kEightBits) x[v].store(row_at<T>(args.out, batch, row) + start);
    }
    if constexpr (kEightBits) {
      top = block_top<kWarps>(top, scratch);
      if (top < kLeastTop) top = kLeastTop;
      std::uint8_t* out = row_at<std::uint8_t>(args.out, batch, row);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        store_e4m3<kSize>(out + (v * kThreads + threadIdx.x) * kSize, x[v].values,
                          kLargestE4m3 / top);
      if (threadIdx.x == 0) *row_at<float>(args.scale, batch, row) = top / kLargestE4m3;
    }
  }
}

// Any width and alignment: the row is read again for each pass.
template <typename T>
__global__ void __launch_bounds__(kThreads) residual_gate_norm_any(const ResidualGateNorm args) {
  __shared__ float scratch[33];
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
    const float mean = block_sum(sum, scratch) / static_cast<float>(args.width);
    float squares = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) {
      const float distance = to_float(x[i]) - mean;
      squares += distance * distance;
    }
    const float inverse_std =
        rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
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
    top = block_top<kWarps>(top, scratch);
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
  constexpr int kVectors = 5120 / kThreads / Vector<T>::kSize;
  bool fits =
      args.width == kThreads * kVectors * Vector<T>::kSize && has_aligned_rows(args.x, sizeof(T));
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
  const int blocks = grid_for(args.batch * args.rows);
  if (fits_vectors<T>(args)) {
    constexpr int kVectors = 5120 / kThreads / Vector<T>::kSize;
    if (args.scale.data == nullptr) {
      launch(residual_gate_norm_registers<T, kVectors, false>, blocks, kThreads, stream, args);
    } else {
      launch(residual_gate_norm_registers<T, kVectors, true>, blocks, kThreads, stream, args);
    }
  } else {
    launch(residual_gate_norm_any<T>, blocks, kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int residual_gate_norm_cuda(const ResidualGateNorm& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
