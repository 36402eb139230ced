#include "lanes.h"
#include "quantize_row.h"
#include "residual_gate_norm.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

// x += y * gate, and the sum of the rounded results.
template <typename T>
float add_row(T* x, const T* y, const float* gate, int64_t width) {
  return sum_of(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    const V added = gate == nullptr ? load<V>(y + i) : load<V>(y + i) * load<V>(gate + i);
    store(x + i, load<V>(x + i) + added);
    return load<V>(x + i);
  });
}

template <typename T>
float sum_row(const T* x, int64_t width) {
  return sum_of(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    return load<V>(x + i);
  });
}

template <typename T>
float inverse_deviation(const T* x, float mean, int64_t width, float eps) {
  const float squares = sum_of(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    const V distance = load<V>(x + i) - mean;
    return distance * distance;
  });
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

// next and next_y are what comes from memory while this row is computed; next_y may be null.
template <typename T>
void norm_row(const T* x, const T* next, const T* next_y, float sum, T* out, T* next_out,
              const float* weight, const float* bias, int64_t width, float eps) {
  const float mean = sum / static_cast<float>(width);
  const float inverse_std = inverse_deviation(x, mean, width, eps);
  for_each(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    __builtin_prefetch(next + i);
    if (next_y != nullptr) __builtin_prefetch(next_y + i);
    __builtin_prefetch(next_out + i, 1);
    store(out + i, (load<V>(x + i) - mean) * inverse_std * load<V>(weight + i) + load<V>(bias + i));
  });
}

template <typename T>
float quantized_norm_row(const T* x, float sum, uint8_t* out, const float* weight,
                         const float* bias, int64_t width, float eps) {
  const float mean = sum / static_cast<float>(width);
  const float inverse_std = inverse_deviation(x, mean, width, eps);
  return quantize_row(
      [=](int64_t i) {
        const float h = (to_float(x[i]) - mean) * inverse_std * weight[i] + bias[i];
        return to_float(from_float<T>(h));
      },
      width, out);
}

template <typename T>
void run(const ResidualGateNorm& args) {
  const int64_t total = args.batch * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < total; ++index) {
    const int64_t batch = index / args.rows, row = index % args.rows;
    const int64_t segment = row < args.num_history ? 0 : 1;
    T* x = row_at<T>(args.x, batch, row);
    const T* y = args.y.data == nullptr ? nullptr : row_at<T>(args.y, batch, row);
    const float* gate = args.gate == nullptr ? nullptr : args.gate + segment * args.gate_stride;
    const float sum = y == nullptr ? sum_row(x, args.width) : add_row(x, y, gate, args.width);
    if (args.scale.data != nullptr) {
      *row_at<float>(args.scale, batch, row) = quantized_norm_row(
          x, sum, row_at<uint8_t>(args.out, batch, row), args.weight + segment * args.weight_stride,
          args.bias + segment * args.bias_stride, args.width, args.eps);
    } else if (args.out.data != nullptr) {
      norm_row(x, x + args.x.row_stride, y == nullptr ? nullptr : y + args.y.row_stride, sum,
               row_at<T>(args.out, batch, row),
               row_at<T>(args.out, batch, row) + args.out.row_stride,
               args.weight + segment * args.weight_stride, args.bias + segment * args.bias_stride,
               args.width, args.eps);
    }
  }
}

}  // namespace

void residual_gate_norm(const ResidualGateNorm& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args)
}

}  // namespace HELIOS_ISA
}  // namespace helios
