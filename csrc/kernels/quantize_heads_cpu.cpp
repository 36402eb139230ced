#include "quantize_heads.h"
#include "quantize_row.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename T>
void run(const QuantizeHeads& args) {
  const int64_t heads_of_all = 3 * args.batch * args.heads;
#pragma omp parallel for
  for (int64_t index = 0; index < heads_of_all; ++index) {
    const HeadRows& part = args.parts[index / (args.batch * args.heads)];
    const int64_t batch = index / args.heads % args.batch, head = index % args.heads;
    const auto row_of = [&](int64_t row) {
      return row_at<T>(part.x, batch, row) + head * args.head_dim;
    };
    float top = 0.0f;
    int num_nan = 0;
    for (int64_t row = 0; row < part.rows; ++row) {
      const T* x = row_of(row);
#pragma omp simd reduction(max : top) reduction(+ : num_nan)
      for (int64_t i = 0; i < args.head_dim; ++i) {
        const float size = fabsf(to_float(x[i]));
        top = size > top ? size : top;
        num_nan += size != size;
      }
    }
    if (num_nan > 0) top = NAN;
    if (top < kLeastTop) top = kLeastTop;
    const float factor = kLargestE4m3 / top;
    for (int64_t row = 0; row < part.rows; ++row) {
      const T* x = row_of(row);
      uint8_t* out = part.out + ((batch * part.rows + row) * args.heads + head) * args.head_dim;
#pragma omp simd
      for (int64_t i = 0; i < args.head_dim; ++i) out[i] = e4m3_of(to_float(x[i]) * factor);
    }
    part.scale[batch * args.heads + head] = top / kLargestE4m3;
  }
}

}  // namespace

void quantize_heads(const QuantizeHeads& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
