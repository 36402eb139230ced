#include "lanes.h"
#include "vae.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

inline int64_t offset(const int64_t* strides, int64_t batch, int64_t frame, int64_t row) {
  return batch * strides[0] + frame * strides[1] + row * strides[2];
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
      value = load<V>(x + c) * (inverse * root) * load<V>(gamma + c);
    } else {
      value = rounded_to<T>(load<V>(x + c) * inverse);
      value = rounded_to<T>(value * root);
      value = rounded_to<T>(value * load<V>(gamma + c));
    }
    if (silu) value = value * reciprocal(exponential(-value) + 1.0f);
    store(out + c, value);
  });
}

// Where a line of pixels begins.
template <typename T>
T* line_at(const Pictures& x, int64_t batch, int64_t frame, int64_t row) {
  return x.data == nullptr ? nullptr
                           : static_cast<T*>(x.data) + offset(x.strides, batch, frame, row);
}

// body(batch, frame, row) for every line, in parallel.
template <typename Args, typename Body>
void for_each_line(const Args& args, Body body) {
  const int64_t lines = args.batch * args.frames * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < lines; ++line)
    body(line / (args.rows * args.frames), line / args.rows % args.frames, line % args.rows);
}

template <typename T>
void norm(const ChannelNormSilu& args) {
  const float root = sqrtf(static_cast<float>(args.channels));
  const T *gamma = static_cast<const T*>(args.gamma),
          *bias = static_cast<const T*>(args.added.bias);
  const bool adds = bias != nullptr || args.added.residual.data != nullptr;
  for_each_line(args, [&](int64_t batch, int64_t frame, int64_t row) {
    T* x = line_at<T>(args.x, batch, frame, row);
    T* out = line_at<T>(args.out, batch, frame, row);
    const T* residual = line_at<T>(args.added.residual, batch, frame, row);
    for (int64_t column = 0; column < args.columns; ++column) {
      const T* from = x;
      if (adds) {
        // The sum goes where it is kept, or where the norm overwrites it.
        T* sum = residual != nullptr ? x : out;
        for_each(args.channels, [=](auto kind, int64_t c) {
          typedef typename decltype(kind)::type V;
          store(sum + c, sum_at<V>(x, bias, residual, c));
        });
        from = sum;
      }
      norm_pixel(from, out, gamma, args.channels, root, args.silu);
      x += args.x.strides[3], out += args.out.strides[3];
      if (residual != nullptr) residual += args.added.residual.strides[3];
    }
  });
}

template <typename T>
void add(const BiasResidual& args) {
  const T* bias = static_cast<const T*>(args.added.bias);
  for_each_line(args, [&](int64_t batch, int64_t frame, int64_t row) {
    const T* x = line_at<T>(args.x, batch, frame, row);
    const T* residual = line_at<T>(args.added.residual, batch, frame, row);
    T* out = line_at<T>(args.out, batch, frame, row);
    for (int64_t column = 0; column < args.columns; ++column) {
      for_each(args.channels, [=](auto kind, int64_t c) {
        typedef typename decltype(kind)::type V;
        store(out + c, sum_at<V>(x, bias, residual, c));
      });
      x += args.x.strides[3], out += args.out.strides[3];
      if (residual != nullptr) residual += args.added.residual.strides[3];
    }
  });
}

template <typename T>
void upsample(const UpsampleNearest& args) {
  const T* bias = static_cast<const T*>(args.added.bias);
  const bool adds = bias != nullptr || args.added.residual.data != nullptr;
  const int64_t bytes = args.channels * static_cast<int64_t>(sizeof(T));
  for_each_line(args, [&](int64_t batch, int64_t frame, int64_t row) {
    const T* x = line_at<T>(args.x, batch, frame, row);
    const T* residual = line_at<T>(args.added.residual, batch, frame, row);
    T* out = line_at<T>(args.out, batch, frame, 2 * row);
    const int64_t down = args.out.strides[2], right = args.out.strides[3];
    for (int64_t column = 0; column < args.columns; ++column) {
      const T* from = x;
      if (adds) {
        for_each(args.channels, [=](auto kind, int64_t c) {
          typedef typename decltype(kind)::type V;
          store(out + c, sum_at<V>(x, bias, residual, c));
        });
        from = out;
      } else {
        memcpy(out, from, bytes);
      }
      memcpy(out + right, from, bytes);
      memcpy(out + down, from, bytes);
      memcpy(out + down + right, from, bytes);
      x += args.x.strides[3], out += 2 * right;
      if (residual != nullptr) residual += args.added.residual.strides[3];
    }
  });
}

}  // namespace

void channel_norm_silu(const ChannelNormSilu& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, norm, args)
}
void upsample_nearest(const UpsampleNearest& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, upsample, args)
}
void bias_residual(const BiasResidual& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, add, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
