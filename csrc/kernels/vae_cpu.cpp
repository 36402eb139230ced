#include "lanes.h"
#include "vae.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

inline int64_t offset(const int64_t* strides, int64_t batch, int64_t frame, int64_t row) {
  return batch * strides[0] + frame * strides[1] + row * strides[2];
}

HELIOS_INLINE float power_of_two(float whole) {
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float factor;
  memcpy(&factor, &bits, sizeof factor);
  return factor;
}

HELIOS_INLINE Lanes power_of_two(Lanes whole) {
  typedef int32_t LaneInts __attribute__((vector_size(64)));
  return (Lanes)((LaneBits)(__builtin_convertvector(whole, LaneInts) + 127) << 23);
}

// e^x to about 2e-7 relative, so that silu needs no vector math library.
template <typename V>
HELIOS_INLINE V exponential(V x) {
  const V low = V{} - 87.0f, high = V{} + 88.0f;
  const V clamped = x < -87.0f ? low : (x > 88.0f ? high : x);
  const V numbers = clamped == clamped ? clamped : low;  // a NaN has no whole part
  const V whole = (numbers * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const V rest = (numbers - whole * 0.693359375f) - whole * -2.12194440e-4f;
  V power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * rest * rest + rest + 1.0f;
  return x == x ? power * power_of_two(whole) : x;
}

template <typename T>
HELIOS_INLINE void norm_pixel(const T* x, T* out, const T* gamma, int64_t channels, float root,
                              bool silu) {
  const float squares = sum_of(channels, [=](auto kind, int64_t c) {
    typedef typename decltype(kind)::type V;
    return load<V>(x + c) * load<V>(x + c);
  });
  const float length = sqrtf(squares);
  const float norm = length < 1e-12f ? 1e-12f : length;
  const float inverse = 1.0f / norm;
  for_each(channels, [=](auto kind, int64_t c) {
    typedef typename decltype(kind)::type V;
    V value;
    if (sizeof(T) == 4) {
      value = load<V>(x + c) * inverse * (load<V>(gamma + c) * root);
    } else {
      value = rounded_to<T>(load<V>(x + c) / norm);
      value = rounded_to<T>(value * root);
      value = rounded_to<T>(value * load<V>(gamma + c));
    }
    if (silu) value = value / (exponential(-value) + 1.0f);
    store(out + c, value);
  });
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
      for_each(args.channels, [=](auto kind, int64_t c) {
        typedef typename decltype(kind)::type V;
        V added = {};
        if (bias != nullptr) added = added + load<V>(bias + c);
        if (residual != nullptr) added = added + load<V>(residual + c);
        store(x + c, load<V>(x + c) + added);
      });
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
