#include "cpu.h"
#include "vae.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

inline int64_t offset(const int64_t* strides, int64_t batch, int64_t frame, int64_t row) {
  return batch * strides[0] + frame * strides[1] + row * strides[2];
}

// e^x to about 2e-7 relative, so that silu vectorises without a vector math library.
inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float scaled = clamped * 1.44269504088896341f;
  const float whole = __builtin_floorf(scaled + 0.5f);
  const float rest = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float power = 1.9875691500e-4f;
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * rest * rest + rest + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float factor;
  memcpy(&factor, &bits, sizeof factor);
  return x != x ? x : power * factor;
}

template <typename T>
void norm_pixel(const T* x, T* out, const T* gamma, int64_t channels, float root, bool silu) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += to_float(x[c]) * to_float(x[c]);
  const float length = sqrtf(squares);
  const float norm = length < 1e-12f ? 1e-12f : length;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    float value;
    if (sizeof(T) == 4) {
      value = to_float(x[c]) / norm * (to_float(gamma[c]) * root);
    } else {
      value = to_float(from_float<T>(to_float(x[c]) / norm));
      value = to_float(from_float<T>(value * root));
      value = to_float(from_float<T>(value * to_float(gamma[c])));
    }
    out[c] = from_float<T>(value);
  }
  if (!silu) return;
  // A loop of its own: together the two did not vectorise. The value is of dtype already, so
  // nothing is rounded twice.
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const float value = to_float(out[c]);
    out[c] = from_float<T>(value / (1.0f + exponential(-value)));
  }
}

template <typename T>
void norm(const ChannelNormSilu& args) {
  const float root = sqrtf(static_cast<float>(args.channels));
  const int64_t lines = args.batch * args.frames * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t row = line % args.rows, frame = line / args.rows % args.frames,
                  batch = line / (args.rows * args.frames);
    const T* x = static_cast<const T*>(args.x.data) + offset(args.x.strides, batch, frame, row);
    T* out = static_cast<T*>(args.out.data) + offset(args.out.strides, batch, frame, row);
    for (int64_t column = 0; column < args.columns; ++column) {
      norm_pixel(x + column * args.x.strides[3], out + column * args.out.strides[3],
                 static_cast<const T*>(args.gamma), args.channels, root, args.silu);
    }
  }
}

template <typename T>
void add(const BiasResidual& args) {
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t lines = args.batch * args.frames * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t row = line % args.rows, frame = line / args.rows % args.frames,
                  batch = line / (args.rows * args.frames);
    for (int64_t column = 0; column < args.columns; ++column) {
      T* x = static_cast<T*>(args.x.data) + offset(args.x.strides, batch, frame, row) +
             column * args.x.strides[3];
      const T* residual = nullptr;
      if (args.residual.data != nullptr) {
        residual = static_cast<const T*>(args.residual.data) +
                   offset(args.residual.strides, batch, frame, row) +
                   column * args.residual.strides[3];
      }
#pragma omp simd
      for (int64_t c = 0; c < args.channels; ++c) {
        const float added = (bias == nullptr ? 0.0f : to_float(bias[c])) +
                            (residual == nullptr ? 0.0f : to_float(residual[c]));
        x[c] = from_float<T>(to_float(x[c]) + added);
      }
    }
  }
}

}  // namespace

void upsample_nearest(const UpsampleNearest& args) noexcept {
  const int64_t bytes = args.channels * args.element_size;
  const int64_t lines = args.batch * args.frames * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t row = line % args.rows, frame = line / args.rows % args.frames,
                  batch = line / (args.rows * args.frames);
    const char* x = static_cast<const char*>(args.x.data) +
                    offset(args.x.strides, batch, frame, row) * args.element_size;
    for (int64_t twice = 0; twice < 2; ++twice) {
      char* out = static_cast<char*>(args.out.data) +
                  offset(args.out.strides, batch, frame, 2 * row + twice) * args.element_size;
      for (int64_t column = 0; column < 2 * args.columns; ++column) {
        memcpy(out + column * args.out.strides[3] * args.element_size,
               x + column / 2 * args.x.strides[3] * args.element_size, bytes);
      }
    }
  }
}

void channel_norm_silu(const ChannelNormSilu& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, norm, args)
}
void bias_residual(const BiasResidual& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, add, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
