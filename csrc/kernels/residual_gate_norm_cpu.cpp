#include "cpu.h"
#include "residual_gate_norm.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename T>
void add_row(T* x, const T* y, const float* gate, int64_t width) {
  if (gate == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) x[i] = from_float<T>(to_float(x[i]) + to_float(y[i]));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    x[i] = from_float<T>(to_float(x[i]) + to_float(y[i]) * gate[i]);
}

template <typename T>
void norm_row(const T* x, T* out, const float* weight, const float* bias, int64_t width,
              float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += to_float(x[i]);
  const float mean = sum / static_cast<float>(width);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    const float distance = to_float(x[i]) - mean;
    squares += distance * distance;
  }
  const float inverse_std = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    out[i] = from_float<T>((to_float(x[i]) - mean) * inverse_std * weight[i] + bias[i]);
  }
}

template <typename T>
void run(const ResidualGateNorm& args) {
  const int64_t total = args.batch * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < total; ++index) {
    const int64_t batch = index / args.rows, row = index % args.rows;
    const int64_t segment = row < args.num_history ? 0 : 1;
    T* x = row_at<T>(args.x, batch, row);
    if (args.y.data != nullptr) {
      const float* gate = args.gate == nullptr ? nullptr : args.gate + segment * args.gate_stride;
      add_row(x, row_at<T>(args.y, batch, row), gate, args.width);
    }
    if (args.out.data != nullptr) {
      norm_row(x, row_at<T>(args.out, batch, row), args.weight + segment * args.weight_stride,
               args.bias + segment * args.bias_stride, args.width, args.eps);
    }
  }
}

}  // namespace

void residual_gate_norm(const ResidualGateNorm& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args)
}

}  // namespace HELIOS_ISA
}  // namespace helios
