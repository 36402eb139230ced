#include "cuda.cuh"
#include "qk_rmsnorm_rope.h"

namespace helios {
namespace {

constexpr int kThreads =
    320;  // two blocks per multiprocessor at least: other bounds made ptxas spill a word
constexpr int kMaxDestinations = 64;

// Destinations by value: the host's array is gone when the kernel runs.
struct Destinations {
  int count;
  std::int64_t first_head[kMaxDestinations + 1];
};

template <typename T>
struct Target {
  T* base;  // of the packed buffer, or of the part in place
  std::int64_t rows, batch, head_dim;
  std::int64_t row, sample, part;

  // Where a head's first element goes.
  __device__ T* head(const Destinations& destinations, std::int64_t head) const {
    if (destinations.count == 0) return base + head * head_dim;
    int d = 0;
    while (head >= destinations.first_head[d + 1]) ++d;
    const std::int64_t first = destinations.first_head[d],
                       heads = destinations.first_head[d + 1] - first;
    const std::int64_t before = rows * batch * 3 * first * head_dim;
    return base + before + (((row * batch + sample) * 3 + part) * heads + head - first) * head_dim;
  }
};

template <typename T>
__device__ __forceinline__ void turn(float& even, float& odd, float cosine, float sine,
                                     float amplify) {
  float first = even * cosine - odd * sine, second = even * sine + odd * cosine;
  if (amplify != 1.0f) first = rounded<T>(first) * amplify, second = rounded<T>(second) * amplify;
  even = first, odd = second;
}

// One block per row and part (q, k, and v where it is packed). kVectors > 0: the row stays in
// registers.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    qk_rmsnorm_rope_registers(const QkRmsnormRope args, const Destinations destinations) {
  __shared__ float scratch[33];
  constexpr int kSize = Vector<T>::kSize;
  const int num_parts = destinations.count == 0 ? 2 : 3;
  const std::int64_t total = args.batch * args.rows * num_parts;
  for (std::int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const std::int64_t part = index % num_parts, row = index / num_parts % args.rows,
                       batch = index / num_parts / args.rows;
    if (part == 0 && row < args.first_query) continue;
    T* source = row_at<T>(args.qkv, batch, row) + part * args.width;
    T* base = destinations.count == 0 ? source : static_cast<T*>(args.packed);
    const Target<T> target{base, args.rows, args.batch, args.head_dim, row, batch, part};
    Vector<T> x[kVectors];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v].load(source + (v * kThreads + threadIdx.x) * kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) squares += x[v].values[i] * x[v].values[i];
    }
    float scale = 1.0f;
    if (part < 2)
      scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
    const T* weights = static_cast<const T*>(part == 0 ? args.q_weight : args.k_weight);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * kThreads + threadIdx.x) * kSize,
                head_dim = static_cast<int>(args.head_dim);
      const int head = start / head_dim, inside = start % head_dim;
      if (part < 2) {
        Vector<T> weight;
        weight.load(weights + start);
        float turns[kSize];
        load_floats<kSize>(turns, args.rotation + row * args.head_dim + inside);
        const bool amplified = part == 1 && args.history_scale != nullptr && row < args.num_history;
        const float amplify = amplified ? args.history_scale[head] : 1.0f;
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          x[v].values[i] = rounded<T>(x[v].values[i] * scale * weight.values[i]);
#pragma unroll
        for (int i = 0; i < kSize; i += 2)
          turn<T>(x[v].values[i], x[v].values[i + 1], turns[i], turns[i + 1], amplify);
      }
      x[v].store(target.head(destinations, head) + inside);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    qk_rmsnorm_rope_any(const QkRmsnormRope args, const Destinations destinations) {
  __shared__ float scratch[33];
  const int num_parts = destinations.count == 0 ? 2 : 3;
  const std::int64_t total = args.batch * args.rows * num_parts;
  for (std::int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const std::int64_t part = index % num_parts, row = index / num_parts % args.rows,
                       batch = index / num_parts / args.rows;
    if (part == 0 && row < args.first_query) continue;
    T* source = row_at<T>(args.qkv, batch, row) + part * args.width;
    T* base = destinations.count == 0 ? source : static_cast<T*>(args.packed);
    const Target<T> target{base, args.rows, args.batch, args.head_dim, row, batch, part};
    float squares = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads)
      squares += to_float(source[i]) * to_float(source[i]);
    float scale = 1.0f;
    if (part < 2)
      scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
    const T* weight = static_cast<const T*>(part == 0 ? args.q_weight : args.k_weight);
    const float* rotation = args.rotation + row * args.head_dim;
    for (std::int64_t pair = threadIdx.x; pair < args.width / 2; pair += kThreads) {
      const std::int64_t start = 2 * pair, head = start / args.head_dim,
                         inside = start % args.head_dim;
      float even = to_float(source[start]), odd = to_float(source[start + 1]);
      if (part < 2) {
        const bool amplified = part == 1 && args.history_scale != nullptr && row < args.num_history;
        even = rounded<T>(even * scale * to_float(weight[start]));
        odd = rounded<T>(odd * scale * to_float(weight[start + 1]));
        turn<T>(even, odd, rotation[inside], rotation[inside + 1],
                amplified ? args.history_scale[head] : 1.0f);
      }
      T* out = target.head(destinations, head) + inside;
      out[0] = from_float<T>(even), out[1] = from_float<T>(odd);
    }
  }
}

template <typename T, int kVectors>
__global__ void __launch_bounds__(kThreads, 2) rmsnorm_rows_registers(const RmsnormRows args) {
  __shared__ float scratch[33];
  constexpr int kSize = Vector<T>::kSize;
  for (std::int64_t index = blockIdx.x; index < args.batch * args.rows; index += gridDim.x) {
    T* row = row_at<T>(args.x, index / args.rows, index % args.rows);
    Vector<T> x[kVectors];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v].load(row + (v * kThreads + threadIdx.x) * kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) squares += x[v].values[i] * x[v].values[i];
    }
    const float scale =
        rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = (v * kThreads + threadIdx.x) * kSize;
      Vector<T> weight;
      weight.load(static_cast<const T*>(args.weight) + start);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[v].values[i] = x[v].values[i] * scale * weight.values[i];
      x[v].store(row + start);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) rmsnorm_rows_any(const RmsnormRows args) {
  __shared__ float scratch[33];
  for (std::int64_t index = blockIdx.x; index < args.batch * args.rows; index += gridDim.x) {
    T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    const T* weight = static_cast<const T*>(args.weight);
    float squares = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads)
      squares += to_float(x[i]) * to_float(x[i]);
    const float scale =
        rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.width) + args.eps);
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) {
      x[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
    }
  }
}

template <typename T>
int run(const QkRmsnormRope& args, cudaStream_t stream) {
  constexpr int kVectors = 5120 / kThreads / Vector<T>::kSize;
  Destinations destinations{};
  if (args.packed != nullptr) {
    if (args.num_destinations > kMaxDestinations) return static_cast<int>(cudaErrorInvalidValue);
    destinations.count = args.num_destinations;
    for (int d = 0; d < args.num_destinations; ++d) {
      destinations.first_head[d + 1] = destinations.first_head[d] + args.heads_per_destination[d];
    }
  }
  const int blocks = grid_for(args.batch * args.rows * (args.packed == nullptr ? 2 : 3));
  const bool fits = args.width == 5120 && args.head_dim % Vector<T>::kSize == 0 &&
                    has_aligned_rows(args.qkv, sizeof(T)) && is_aligned(args.q_weight) &&
                    is_aligned(args.k_weight) && is_aligned(args.rotation) &&
                    (args.packed == nullptr || is_aligned(args.packed));
  if (fits) {
    launch(qk_rmsnorm_rope_registers<T, kVectors>, blocks, kThreads, stream, args, destinations);
  } else {
    launch(qk_rmsnorm_rope_any<T>, blocks, kThreads, stream, args, destinations);
  }
  return finish();
}

template <typename T>
int run_rows(const RmsnormRows& args, cudaStream_t stream) {
  constexpr int kVectors = 5120 / kThreads / Vector<T>::kSize;
  const int blocks = grid_for(args.batch * args.rows);
  if (args.width == 5120 && has_aligned_rows(args.x, sizeof(T)) && is_aligned(args.weight)) {
    launch(rmsnorm_rows_registers<T, kVectors>, blocks, kThreads, stream, args);
  } else {
    launch(rmsnorm_rows_any<T>, blocks, kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int qk_rmsnorm_rope_cuda(const QkRmsnormRope& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

int rmsnorm_rows_cuda(const RmsnormRows& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_rows, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
