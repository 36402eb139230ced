#include "quantize_row.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

inline float tanh_gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(kGeluBeta * (x + kGeluKappa * (x * x * x))));
}

template <typename T>
void run(const QuantizeRows& args) {
  const int64_t total = args.batch * args.rows;
#pragma omp parallel for
  for (int64_t index = 0; index < total; ++index) {
    const T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    uint8_t* out = args.out + index * args.width;
    if (args.gelu) {
      args.scale[index] = quantize_row(
          [x](int64_t i) { return to_float(from_float<T>(tanh_gelu(to_float(x[i])))); }, args.width,
          out);
    } else {
      args.scale[index] = quantize_row([x](int64_t i) { return to_float(x[i]); }, args.width, out);
    }
  }
}

}  // namespace

void quantize_rows(const QuantizeRows& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
