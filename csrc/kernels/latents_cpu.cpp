#include "cpu.h"
#include "latents.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename X, typename N, typename O>
void upsample(const UpsampleRenoise& args) {
  const int64_t total = args.planes * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < total; ++line) {
    for (int64_t column = 0; column < args.columns; ++column) {
      const int64_t index = line * args.columns + column;
      const float x =
          to_float(from_float<X>(args.alpha * to_float(static_cast<const X*>(args.x)[index])));
      const float* draw = args.draws + 4 * index;
      for (int place = 0; place < 4; ++place) {
        const float* row = args.factor + 4 * place;
        const float sum = draw[0] * row[0] + draw[1] * row[1] + draw[2] * row[2] + draw[3] * row[3];
        const float noise = to_float(from_float<N>(args.beta * to_float(from_float<N>(sum))));
        const int64_t target = (2 * line + place / 2) * 2 * args.columns + 2 * column + place % 2;
        static_cast<O*>(args.out)[target] = from_float<O>(x + noise);
      }
    }
  }
}

template <typename N>
void upsample_to(const UpsampleRenoise& args) {
  if (args.x_dtype == DType::kFloat32) return upsample<float, N, float>(args);
  upsample<N, N, N>(args);  // equal dtypes; the binding refuses other mixtures
}

template <typename T>
float projection(const CfgCombine& args, int64_t sample) {
  const T* positive = static_cast<const T*>(args.positive) + sample * args.count;
  const T* negative = static_cast<const T*>(args.negative) + sample * args.count;
  const int64_t size = (args.count + kCfgBlocks - 1) / kCfgBlocks;
  double* sums = args.workspace + sample * kCfgBlocks * 2;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < kCfgBlocks; ++block) {
    const int64_t end = (block + 1) * size < args.count ? (block + 1) * size : args.count;
    double dot = 0.0, square = 0.0;
    for (int64_t i = block * size; i < end; ++i) {
      const double c = to_float(positive[i]), u = to_float(negative[i]);
      dot += c * u;
      square += u * u;
    }
    sums[2 * block] = dot;
    sums[2 * block + 1] = square;
  }
  double dot = 0.0, square = 0.0;
  for (int64_t block = 0; block < kCfgBlocks; ++block) {
    dot += sums[2 * block];
    square += sums[2 * block + 1];
  }
  return static_cast<float>(dot) / (static_cast<float>(square) + 1e-8f);
}

template <typename T>
void combine(const CfgCombine& args) {
  for (int64_t sample = 0; sample < args.batch; ++sample) {
    const T* positive = static_cast<const T*>(args.positive) + sample * args.count;
    const T* negative = static_cast<const T*>(args.negative) + sample * args.count;
    T* out = static_cast<T*>(args.out) + sample * args.count;
    const float factor =
        args.zero_star ? to_float(from_float<T>(projection<T>(args, sample))) : 1.0f;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < args.count; ++i) {
      const float base = args.zero_star ? to_float(from_float<T>(to_float(negative[i]) * factor))
                                        : to_float(negative[i]);
      const float difference = to_float(from_float<T>(to_float(positive[i]) - base));
      out[i] = from_float<T>(base + to_float(from_float<T>(args.scale * difference)));
    }
  }
}

}  // namespace

void upsample_renoise(const UpsampleRenoise& args) noexcept {
  HELIOS_FOR_DTYPE(args.noise_dtype, upsample_to, args)
}
void cfg_combine(const CfgCombine& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, combine, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
