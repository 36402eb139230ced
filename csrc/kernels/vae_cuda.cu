#include "cuda.cuh"
#include "vae.h"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Place {
  int64_t batch, frame, row, column;
};

__device__ __forceinline__ Place place_of(int64_t pixel, int64_t frames, int64_t rows,
                                          int64_t columns) {
  return {pixel / (columns * rows * frames), pixel / (columns * rows) % frames,
          pixel / columns % rows, pixel % columns};
}

__device__ __forceinline__ int64_t offset(const Pictures& x, const Place& at) {
  return at.batch * x.strides[0] + at.frame * x.strides[1] + at.row * x.strides[2] +
         at.column * x.strides[3];
}

template <typename T>
__device__ __forceinline__ float normed(float x, float gamma, float norm, float root, bool silu) {
  float value;
  if constexpr (sizeof(T) == 4) {
    value = x / norm * (gamma * root);
  } else {
    value = rounded<T>(rounded<T>(rounded<T>(x / norm) * root) * gamma);
  }
  return silu ? value / (1.0f + expf(-value)) : value;
}

// One warp per pixel. kVectors > 0: a lane holds up to so many vectors, and channels are a multiple
// of a vector's size.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads) norm_vectors(const ChannelNormSilu args, float root) {
  constexpr int kSize = Vector<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int64_t total = args.batch * args.frames * args.rows * args.columns;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; pixel < total;
       pixel += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Place at = place_of(pixel, args.frames, args.rows, args.columns);
    const T* from = static_cast<const T*>(args.x.data) + offset(args.x, at);
    T* to = static_cast<T*>(args.out.data) + offset(args.out, at);
    Vector<T> x[kVectors];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * 32 + lane) * kSize;
      if (start < args.channels) {
        x[v].load(from + start);
#pragma unroll
        for (int i = 0; i < kSize; ++i) squares += x[v].values[i] * x[v].values[i];
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    const float length = sqrtf(squares);
    const float norm = length < 1e-12f ? 1e-12f : length;  // fmaxf would make a number of NaN
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * 32 + lane) * kSize;
      if (start < args.channels) {
        Vector<T> gamma;
        gamma.load(static_cast<const T*>(args.gamma) + start);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[v].values[i] = normed<T>(x[v].values[i], gamma.values[i], norm, root, args.silu);
        x[v].store(to + start);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) norm_any(const ChannelNormSilu args, float root) {
  const int lane = threadIdx.x % 32;
  const int64_t total = args.batch * args.frames * args.rows * args.columns;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; pixel < total;
       pixel += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Place at = place_of(pixel, args.frames, args.rows, args.columns);
    const T* from = static_cast<const T*>(args.x.data) + offset(args.x, at);
    T* to = static_cast<T*>(args.out.data) + offset(args.out, at);
    float squares = 0.0f;
    for (int64_t c = lane; c < args.channels; c += 32)
      squares += to_float(from[c]) * to_float(from[c]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    const float length = sqrtf(squares);
    const float norm = length < 1e-12f ? 1e-12f : length;  // fmaxf would make a number of NaN
    const T* gamma = static_cast<const T*>(args.gamma);
    for (int64_t c = lane; c < args.channels; c += 32) {
      to[c] =
          from_float<T>(normed<T>(to_float(from[c]), to_float(gamma[c]), norm, root, args.silu));
    }
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) upsample(const UpsampleNearest args, int64_t units) {
  constexpr int64_t kBytes = sizeof(Unit);
  const int64_t total = args.batch * args.frames * args.rows * args.columns * units;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t unit = i % units;
    Place at = place_of(i / units, args.frames, args.rows, args.columns);
    const char* from =
        static_cast<const char*>(args.x.data) + offset(args.x, at) * args.element_size;
    const Unit value = *reinterpret_cast<const Unit*>(from + unit * kBytes);
    at.row *= 2, at.column *= 2;
    char* to = static_cast<char*>(args.out.data) + offset(args.out, at) * args.element_size +
               unit * kBytes;
    const int64_t down = args.out.strides[2] * args.element_size,
                  right = args.out.strides[3] * args.element_size;
    *reinterpret_cast<Unit*>(to) = value;
    *reinterpret_cast<Unit*>(to + right) = value;
    *reinterpret_cast<Unit*>(to + down) = value;
    *reinterpret_cast<Unit*>(to + down + right) = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add(const BiasResidual args) {
  const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t c = i % args.channels;
    const Place at = place_of(i / args.channels, args.frames, args.rows, args.columns);
    float added = args.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(args.bias)[c]);
    if (args.residual.data != nullptr)
      added += to_float(static_cast<const T*>(args.residual.data)[offset(args.residual, at) + c]);
    T* x = static_cast<T*>(args.x.data) + offset(args.x, at) + c;
    *x = from_float<T>(to_float(*x) + added);
  }
}

bool has_aligned_pixels(const Pictures& x, int64_t element_size) {
  bool aligned = is_aligned(x.data);
  for (int64_t stride : x.strides) aligned = aligned && stride * element_size % 16 == 0;
  return aligned;
}

template <typename T>
int run_norm(const ChannelNormSilu& args, cudaStream_t stream) {
  const float root = sqrtf(static_cast<float>(args.channels));
  const int blocks =
      grid_for((args.batch * args.frames * args.rows * args.columns + kWarps - 1) / kWarps);
  const bool fits = args.channels % Vector<T>::kSize == 0 &&
                    has_aligned_pixels(args.x, sizeof(T)) &&
                    has_aligned_pixels(args.out, sizeof(T)) && is_aligned(args.gamma);
  const int64_t vectors = (args.channels / Vector<T>::kSize + 31) / 32;
  if (fits && vectors == 1) {
    launch(norm_vectors<T, 1>, blocks, kThreads, stream, args, root);
  } else if (fits && vectors <= 3) {
    launch(norm_vectors<T, 3>, blocks, kThreads, stream, args, root);
  } else {
    launch(norm_any<T>, blocks, kThreads, stream, args, root);
  }
  return finish();
}

template <typename T>
int run_add(const BiasResidual& args, cudaStream_t stream) {
  const int64_t total = args.batch * args.frames * args.rows * args.columns * args.channels;
  launch(add<T>, grid_for((total + kThreads - 1) / kThreads), kThreads, stream, args);
  return finish();
}

template <typename Unit>
int upsample_by(const UpsampleNearest& args, cudaStream_t stream) {
  const int64_t units = args.channels * args.element_size / static_cast<int64_t>(sizeof(Unit));
  const int64_t total = args.batch * args.frames * args.rows * args.columns * units;
  launch(upsample<Unit>, grid_for((total + kThreads - 1) / kThreads), kThreads, stream, args,
         units);
  return finish();
}

}  // namespace

int channel_norm_silu_cuda(const ChannelNormSilu& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_norm, args, static_cast<cudaStream_t>(stream))
}

int upsample_nearest_cuda(const UpsampleNearest& args, void* stream) noexcept {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.channels * args.element_size % 16 == 0 &&
      has_aligned_pixels(args.x, args.element_size) &&
      has_aligned_pixels(args.out, args.element_size)) {
    return upsample_by<uint4>(args, on);
  }
  return args.element_size == 4 ? upsample_by<std::uint32_t>(args, on)
                                : upsample_by<std::uint16_t>(args, on);
}

int bias_residual_cuda(const BiasResidual& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_add, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
