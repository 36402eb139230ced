#include "lanes.h"
#include "quantize_row.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

constexpr int64_t kBuffered = 16384;  // elements of a row on the stack, 64 KB

// tanh-GELU rounded to T, as x * sigmoid(2 u) with u = beta * (x + kappa * x^3).
template <typename V, typename T>
HELIOS_INLINE V tanh_gelu(const T* from) {
  const V x = load<V>(from);
  const V twice = (x + kGeluKappa * (x * x * x)) * (2.0f * kGeluBeta);
  return rounded_to<T>(x / (exponential(-twice) + 1.0f));
}

template <typename T>
float quantize_gelu_row(const T* x, int64_t width, uint8_t* out) {
  if (width > kBuffered)
    return quantize_row([x](int64_t i) { return tanh_gelu<float>(x + i); }, width, out);
  float values[kBuffered];
  float* to = values;
  for_each(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    store(to + i, tanh_gelu<V>(x + i));
  });
  return quantize_row([to](int64_t i) { return to[i]; }, width, out);
}

template <typename T>
void run(const QuantizeRows& args) {
  const int64_t total = args.batch * args.rows;
#pragma omp parallel for
  for (int64_t index = 0; index < total; ++index) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    uint8_t* out = args.out + index * args.width;
    if (args.gelu) {
      args.scale[index] = quantize_gelu_row(x, args.width, out);
    } else {
      args.scale[index] = quantize_row([x](int64_t i) { return to_float(x[i]); }, args.width, out);
    }
  }
}

}  // namespace

void quantize_rows(const QuantizeRows& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
