#include "cuda.cuh"
#include "vae.h"

namespace helios {
namespace {

using std::int64_t;

// A block takes one line of pixels, so that where it lies is worked out once and columns are
// counted in 32 bits.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int64_t offset(const Pictures& x, int64_t batch, int64_t frame,
                                          int64_t row) {
  return batch * x.strides[0] + frame * x.strides[1] + row * x.strides[2];
}

// Where a line begins, by its number among [frame, row] of one sample.
template <typename T, typename Args>
__device__ __forceinline__ T* line_of(const Pictures& x, const Args& args, int64_t batch,
                                      unsigned line) {
  const unsigned rows = static_cast<unsigned>(args.rows);
  return static_cast<T*>(x.data) + offset(x, batch, line / rows, line % rows);
}

// x / (1 + e^-x), to about 1e-6 relative; below -87 it is zero.
__device__ __forceinline__ float silu(float x) {
  return x * fast_reciprocal(1.0f + fast_exp2(x * -1.4426950408889634f));
}

// 1 / max(sqrt(squares), 1e-12); a NaN stays one.
__device__ __forceinline__ float inverse_norm(float squares) {
  const float inverse = __frsqrt_rn(squares);
  return inverse > 1e12f ? 1e12f : inverse;
}

// x + (bias + residual), rounded once.
template <typename T>
__device__ __forceinline__ uint4 sum_of(uint4 bits, uint4 bias, const uint4* residual) {
  if constexpr (sizeof(T) < 4) {
    if (residual == nullptr) {
      return {sum_of_pairs<T>(bits.x, bias.x), sum_of_pairs<T>(bits.y, bias.y),
              sum_of_pairs<T>(bits.z, bias.z), sum_of_pairs<T>(bits.w, bias.w)};
    }
  }
  Vector<T> x, more;
  x.set(bits), more.set(bias);
  if (residual != nullptr) {
    Vector<T> other;
    other.set(*residual);
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) more.values[i] += other.values[i];
  }
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) x.values[i] += more.values[i];
  return x.bits();
}

// A vector's share of a bias, or zeros.
template <typename T>
__device__ __forceinline__ uint4 bias_at(const void* bias, int start) {
  if (bias == nullptr) return {0, 0, 0, 0};
  return load_bits(static_cast<const T*>(bias) + start);
}

// The norm of one vector. Float32 keeps gamma * sqrt(channels); 16 bits round after every product.
template <typename T>
__device__ __forceinline__ uint4 normed(uint4 bits, uint4 gamma, float inverse, float root,
                                        bool with_silu) {
  constexpr int kSize = Vector<T>::kSize;
  Vector<T> x;
  x.set(bits);
#pragma unroll
  for (int i = 0; i < kSize; ++i) x.values[i] *= inverse;
  if constexpr (sizeof(T) == 4) {
    Vector<T> scaled;
    scaled.set(gamma);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x.values[i] *= scaled.values[i];
  } else {
    x.round();
#pragma unroll
    for (int i = 0; i < kSize; ++i) x.values[i] *= root;
    const uint4 rooted = x.bits();
    x.set({product_of_pairs<T>(rooted.x, gamma.x), product_of_pairs<T>(rooted.y, gamma.y),
           product_of_pairs<T>(rooted.z, gamma.z), product_of_pairs<T>(rooted.w, gamma.w)});
  }
  if (with_silu) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x.values[i] = silu(x.values[i]);
  }
  return x.bits();
}

constexpr int kVectors = 3;  // of a lane: the model's channels are 96, 192 and 384

enum class Adding { kNothing, kBias, kResidual };  // the last one with a bias or without

// kLanes lanes per pixel, each with three vectors of it.
template <typename T, int kLanes, Adding kAdding>
__global__ void __launch_bounds__(kThreads) norm_lines(const ChannelNormSilu args, float root) {
  constexpr int kSize = Vector<T>::kSize, kPixels = 32 / kLanes, kStep = kLanes * kSize;
  const int start = threadIdx.x % kLanes * kSize, pixel = threadIdx.x % 32 / kLanes;
  const int columns = static_cast<int>(args.columns);
  uint4 gamma[kVectors], bias[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    gamma[v] = load_bits(static_cast<const T*>(args.gamma) + start + v * kStep);
    if constexpr (sizeof(T) == 4) {
      Vector<T> scaled;
      scaled.set(gamma[v]);
#pragma unroll
      for (int i = 0; i < kSize; ++i) scaled.values[i] *= root;
      gamma[v] = scaled.bits();
    }
    if constexpr (kAdding != Adding::kNothing)
      bias[v] = bias_at<T>(args.added.bias, start + v * kStep);
  }
  const unsigned lines = static_cast<unsigned>(args.frames * args.rows);
  for (int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (unsigned line = blockIdx.x; line < lines; line += gridDim.x) {
      T* x_line = line_of<T>(args.x, args, batch, line) + start;
      T* out_line = line_of<T>(args.out, args, batch, line) + start;
      const T* other_line = kAdding == Adding::kResidual
                                ? line_of<T>(args.added.residual, args, batch, line) + start
                                : nullptr;
      const int x_stride = static_cast<int>(args.x.strides[3]),
                out_stride = static_cast<int>(args.out.strides[3]),
                other_stride = static_cast<int>(args.added.residual.strides[3]);
#pragma unroll 1
      for (int first = threadIdx.x / 32 * kPixels; first < columns; first += kWarps * kPixels) {
        // Lanes without a pixel of their own compute another one's again, for the shuffles' sake.
        const bool is_real = first + pixel < columns;
        const int column = is_real ? first + pixel : columns - 1;
        T* x = x_line + column * x_stride;
        uint4 bits[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) bits[v] = load_bits(x + v * kStep);
        if constexpr (kAdding == Adding::kBias) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) bits[v] = sum_of<T>(bits[v], bias[v], nullptr);
        }
        if constexpr (kAdding == Adding::kResidual) {
          const T* other = other_line + column * other_stride;
          uint4 others[kVectors];
#pragma unroll
          for (int v = 0; v < kVectors; ++v) others[v] = load_bits(other + v * kStep);
          // Every lane has read before one writes: lanes may share the last pixel.
          __syncwarp();
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            bits[v] = sum_of<T>(bits[v], bias[v], &others[v]);
            if (is_real) store_bits(x + v * kStep, bits[v]);
          }
        }
        float squares = 0.0f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> values;
          values.set(bits[v]);
#pragma unroll
          for (int i = 0; i < kSize; ++i)
            squares = __fmaf_rn(values.values[i], values.values[i], squares);
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2)
          squares += __shfl_xor_sync(0xffffffffu, squares, step);
        const float inverse = inverse_norm(squares);
        T* out = out_line + column * out_stride;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const uint4 result = normed<T>(bits[v], gamma[v], inverse, root, args.silu);
          if (is_real) store_bits(out + v * kStep, result);
        }
      }
    }
  }
}

struct Place {
  int64_t batch, frame, row, column;
};

__device__ __forceinline__ Place place_of(int64_t pixel, int64_t frames, int64_t rows,
                                          int64_t columns) {
  return {pixel / (columns * rows * frames), pixel / (columns * rows) % frames,
          pixel / columns % rows, pixel % columns};
}

template <typename T>
__device__ __forceinline__ T* pixel_at(const Pictures& x, const Place& at) {
  return static_cast<T*>(x.data) + offset(x, at.batch, at.frame, at.row) + at.column * x.strides[3];
}

// x + (bias + residual) of one channel, rounded once.
template <typename T>
__device__ __forceinline__ float sum_at(const T* x, const Addends& added, const Place& at,
                                        int64_t channel) {
  float more = 0.0f;
  if (added.bias != nullptr) more += to_float(static_cast<const T*>(added.bias)[channel]);
  if (added.residual.data != nullptr) more += to_float(pixel_at<T>(added.residual, at)[channel]);
  return rounded<T>(to_float(x[channel]) + more);
}

// Any channels and strides: one warp per pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads) norm_any(const ChannelNormSilu args, float root) {
  const int lane = threadIdx.x % 32;
  const int64_t total = args.batch * args.frames * args.rows * args.columns;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; pixel < total;
       pixel += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Place at = place_of(pixel, args.frames, args.rows, args.columns);
    T* x = pixel_at<T>(args.x, at);
    T* to = pixel_at<T>(args.out, at);
    float squares = 0.0f;
    for (int64_t c = lane; c < args.channels; c += 32) {
      const float value = sum_at(x, args.added, at, c);
      squares += value * value;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    const float inverse = inverse_norm(squares);
    const T* gamma = static_cast<const T*>(args.gamma);
    for (int64_t c = lane; c < args.channels; c += 32) {
      const float sum = sum_at(x, args.added, at, c);
      if (args.added.residual.data != nullptr) x[c] = from_float<T>(sum);
      float value;
      if constexpr (sizeof(T) == 4) {
        value = sum * inverse * (gamma[c] * root);
      } else {
        value = rounded<T>(rounded<T>(rounded<T>(sum * inverse) * root) * to_float(gamma[c]));
      }
      to[c] = from_float<T>(args.silu ? silu(value) : value);
    }
  }
}

// A thread has the same channels all along: blocks have a whole number of pixels side by side.
template <typename T, bool kAdds>
__global__ void __launch_bounds__(kThreads) upsample_lines(const UpsampleNearest args) {
  constexpr int kSize = Vector<T>::kSize;
  const int units = static_cast<int>(args.channels) / kSize;
  const int start = threadIdx.x % units * kSize, pixels = blockDim.x / units;
  const int columns = static_cast<int>(args.columns);
  const uint4 bias = bias_at<T>(kAdds ? args.added.bias : nullptr, start);
  const bool has_residual = kAdds && args.added.residual.data != nullptr;
  const unsigned lines = static_cast<unsigned>(args.frames * args.rows);
  const unsigned rows = static_cast<unsigned>(args.rows);
  for (int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (unsigned line = blockIdx.x; line < lines; line += gridDim.x) {
      const T* x_line = line_of<T>(args.x, args, batch, line) + start;
      const T* other_line =
          has_residual ? line_of<T>(args.added.residual, args, batch, line) + start : nullptr;
      T* out_line = static_cast<T*>(args.out.data) +
                    offset(args.out, batch, line / rows, line % rows * 2) + start;
      const int x_stride = static_cast<int>(args.x.strides[3]),
                right = static_cast<int>(args.out.strides[3]),
                other_stride = static_cast<int>(args.added.residual.strides[3]);
#pragma unroll 1
      for (int column = threadIdx.x / units; column < columns; column += pixels) {
        uint4 bits = load_bits(x_line + column * x_stride);
        if constexpr (kAdds) {
          if (has_residual) {
            const uint4 other = load_bits(other_line + column * other_stride);
            bits = sum_of<T>(bits, bias, &other);
          } else {
            bits = sum_of<T>(bits, bias, nullptr);
          }
        }
        T* to = out_line + column * 2 * right;
        store_bits(to, bits), store_bits(to + right, bits);
        to += args.out.strides[2];
        store_bits(to, bits), store_bits(to + right, bits);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_any(const UpsampleNearest args) {
  const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t c = i % args.channels;
    Place at = place_of(i / args.channels, args.frames, args.rows, args.columns);
    const T* x = pixel_at<T>(args.x, at);
    const bool adds = args.added.bias != nullptr || args.added.residual.data != nullptr;
    const T value = adds ? from_float<T>(sum_at(x, args.added, at, c)) : x[c];
    at.row *= 2, at.column *= 2;
    T* to = pixel_at<T>(args.out, at) + c;
    const int64_t down = args.out.strides[2], right = args.out.strides[3];
    to[0] = value, to[right] = value, to[down] = value, to[down + right] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_lines(const BiasResidual args) {
  constexpr int kSize = Vector<T>::kSize;
  const int units = static_cast<int>(args.channels) / kSize;
  const int start = threadIdx.x % units * kSize, pixels = blockDim.x / units;
  const int columns = static_cast<int>(args.columns);
  const uint4 bias = bias_at<T>(args.added.bias, start);
  const bool has_residual = args.added.residual.data != nullptr;
  const unsigned lines = static_cast<unsigned>(args.frames * args.rows);
  for (int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (unsigned line = blockIdx.x; line < lines; line += gridDim.x) {
      const T* x_line = line_of<T>(args.x, args, batch, line) + start;
      const T* other_line =
          has_residual ? line_of<T>(args.added.residual, args, batch, line) + start : nullptr;
      T* out_line = line_of<T>(args.out, args, batch, line) + start;
      const int x_stride = static_cast<int>(args.x.strides[3]),
                out_stride = static_cast<int>(args.out.strides[3]),
                other_stride = static_cast<int>(args.added.residual.strides[3]);
#pragma unroll 1
      for (int column = threadIdx.x / units; column < columns; column += pixels) {
        uint4 bits = load_bits(x_line + column * x_stride);
        if (has_residual) {
          const uint4 other = load_bits(other_line + column * other_stride);
          bits = sum_of<T>(bits, bias, &other);
        } else {
          bits = sum_of<T>(bits, bias, nullptr);
        }
        store_bits(out_line + column * out_stride, bits);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_any(const BiasResidual args) {
  const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t c = i % args.channels;
    const Place at = place_of(i / args.channels, args.frames, args.rows, args.columns);
    pixel_at<T>(args.out, at)[c] =
        from_float<T>(sum_at(pixel_at<T>(args.x, at), args.added, at, c));
  }
}

// True where pixels start on sixteen bytes and a line's offsets fit 32 bits.
bool has_aligned_pixels(const Pictures& x, int64_t element_size, int64_t columns) {
  bool aligned = is_aligned(x.data) && columns * x.strides[3] * element_size < (1 << 30);
  for (int64_t stride : x.strides) aligned = aligned && stride * element_size % 16 == 0;
  return aligned;
}

template <typename T, typename Args>
bool fits_vectors(const Args& args, int64_t out_columns) {
  const Addends& added = args.added;
  return args.channels % Vector<T>::kSize == 0 && args.frames * args.rows < (int64_t{1} << 31) &&
         has_aligned_pixels(args.x, sizeof(T), args.columns) &&
         has_aligned_pixels(args.out, sizeof(T), out_columns) &&
         (added.bias == nullptr || is_aligned(added.bias)) &&
         (added.residual.data == nullptr ||
          has_aligned_pixels(added.residual, sizeof(T), args.columns));
}

bool adds(const Addends& added) { return added.bias != nullptr || added.residual.data != nullptr; }

template <typename T, int kLanes>
void launch_norm(const ChannelNormSilu& args, float root, cudaStream_t stream) {
  const dim3 blocks = grid_for(args.frames * args.rows, args.batch);
  if (args.added.residual.data != nullptr) {
    launch(norm_lines<T, kLanes, Adding::kResidual>, blocks, kThreads, stream, args, root);
  } else if (args.added.bias != nullptr) {
    launch(norm_lines<T, kLanes, Adding::kBias>, blocks, kThreads, stream, args, root);
  } else {
    launch(norm_lines<T, kLanes, Adding::kNothing>, blocks, kThreads, stream, args, root);
  }
}

template <typename T>
int run_norm(const ChannelNormSilu& args, cudaStream_t stream) {
  const float root = sqrtf(static_cast<float>(args.channels));
  const int64_t per_lane = kVectors * Vector<T>::kSize;
  const bool fits = fits_vectors<T>(args, args.columns) && is_aligned(args.gamma) &&
                    args.channels % per_lane == 0;
  const int64_t lanes = fits ? args.channels / per_lane : 0;
  if (lanes == 4) {
    launch_norm<T, 4>(args, root, stream);
  } else if (lanes == 8) {
    launch_norm<T, 8>(args, root, stream);
  } else if (lanes == 16) {
    launch_norm<T, 16>(args, root, stream);
  } else if (lanes == 32) {
    launch_norm<T, 32>(args, root, stream);
  } else {
    const int64_t pixels = args.batch * args.frames * args.rows * args.columns;
    launch(norm_any<T>, grid_for((pixels + kWarps - 1) / kWarps), kThreads, stream, args, root);
  }
  return finish();
}

// Threads of a block that has whole pixels, or 0 where a pixel has more vectors than a block
// threads.
template <typename T>
int threads_for(int64_t channels) {
  const int64_t units = channels / Vector<T>::kSize;
  return units > kThreads ? 0 : static_cast<int>(kThreads / units * units);
}

template <typename T>
int run_upsample(const UpsampleNearest& args, cudaStream_t stream) {
  const int threads = fits_vectors<T>(args, 2 * args.columns) ? threads_for<T>(args.channels) : 0;
  const dim3 blocks = grid_for(args.frames * args.rows, args.batch);
  if (threads == 0) {
    const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
    launch(upsample_any<T>, grid_for((total + kThreads - 1) / kThreads), kThreads, stream, args);
  } else if (adds(args.added)) {
    launch(upsample_lines<T, true>, blocks, threads, stream, args);
  } else {
    launch(upsample_lines<T, false>, blocks, threads, stream, args);
  }
  return finish();
}

template <typename T>
int run_add(const BiasResidual& args, cudaStream_t stream) {
  const int threads = fits_vectors<T>(args, args.columns) ? threads_for<T>(args.channels) : 0;
  if (threads == 0) {
    const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
    launch(add_any<T>, grid_for((total + kThreads - 1) / kThreads), kThreads, stream, args);
  } else {
    const dim3 blocks = grid_for(args.frames * args.rows, args.batch);
    launch(add_lines<T>, blocks, threads, stream, args);
  }
  return finish();
}

}  // namespace

int channel_norm_silu_cuda(const ChannelNormSilu& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_norm, args, static_cast<cudaStream_t>(stream))
}

int upsample_nearest_cuda(const UpsampleNearest& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_upsample, args, static_cast<cudaStream_t>(stream))
}

int bias_residual_cuda(const BiasResidual& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_add, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
