#include "cuda.cuh"
#include "qk_rmsnorm_rope.h"

namespace helios {
namespace {

// Few threads with forty elements each: what a block's sum costs is spent once per row and warp.
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWidth = 5120, kHeadDim = 128;  // what the kernels below serve from registers
constexpr int kMaxDestinations = 64, kMaxHeads = 256;

// Destinations by value: the host's array is gone when the kernel runs.
struct Destinations {
  int count;
  std::int64_t first_head[kMaxDestinations + 1];
  std::uint8_t of_head[kMaxHeads];
};

// Where a part (q, k or v) of one row goes.
template <typename T>
struct Target {
  T* base;  // of the packed buffer, or of the part in place
  std::int64_t rows, batch, head_dim;
  std::int64_t row, sample, part;

  // Where a head's first element goes.
  __device__ __forceinline__ T* head(const Destinations& destinations, int head) const {
    if (destinations.count == 0) return base + head * head_dim;
    const int d = destinations.of_head[head];
    const std::int64_t first = destinations.first_head[d],
                       heads = destinations.first_head[d + 1] - first;
    const std::int64_t before = rows * batch * 3 * first * head_dim;
    return base + before + (((row * batch + sample) * 3 + part) * heads + head - first) * head_dim;
  }
};

template <typename T>
__device__ __forceinline__ void rotate(float& even, float& odd, float cosine, float sine) {
  const float first = multiply_add<T>(even, cosine, -(odd * sine));
  odd = multiply_add<T>(even, sine, odd * cosine);
  even = first;
}

// One block per row and part (q, k, and v where it is packed); the row stays in registers.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    qk_rmsnorm_rope_registers(const QkRmsnormRope args, const Destinations destinations) {
  constexpr int kSize = Vector<T>::kSize, kVectors = kWidth / kThreads / kSize;
  constexpr int kStride = kThreads * kSize;
  __shared__ float scratch[2][kWarps];
  const int part = kPacked ? blockIdx.y % 3 : blockIdx.y % 2;
  const int step = gridDim.y / (kPacked ? 3 : 2), first = threadIdx.x * kSize;
  const int head = first / kHeadDim, inside = first % kHeadDim;
  int turn = 0;
  for (std::int64_t batch = blockIdx.y / (kPacked ? 3 : 2); batch < args.batch; batch += step) {
    for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
      if (part == 0 && row < args.first_query) continue;
      T* source = row_at<T>(args.qkv, batch, row) + part * kWidth;
      const Target<T> target{kPacked ? static_cast<T*>(args.packed) : source,
                             args.rows,
                             args.batch,
                             kHeadDim,
                             row,
                             batch,
                             part};
      uint4 bits[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) bits[v] = load_bits(source + first + v * kStride);
      if (part < 2) {
        const T* weights = static_cast<const T*>(part == 0 ? args.q_weight : args.k_weight) + first;
        float turns[kSize];
        load_floats<kSize>(turns, args.rotation + row * kHeadDim + inside);
        float squares = 0.0f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> x;
          x.set(bits[v]);
#pragma unroll
          for (int i = 0; i < kSize; ++i) squares = __fmaf_rn(x.values[i], x.values[i], squares);
        }
        const float sum = block_sum<kWarps>(squares, scratch[turn]);
        turn ^= 1;
        const float scale = rsqrtf(sum * (1.0f / kWidth) + args.eps);
        const bool amplified = part == 1 && args.history_scale != nullptr && row < args.num_history;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> x, weight;
          x.set(bits[v]), weight.load(weights + v * kStride);
#pragma unroll
          for (int i = 0; i < kSize; ++i) x.values[i] = x.values[i] * scale * weight.values[i];
          x.round();
#pragma unroll
          for (int i = 0; i < kSize; i += 2)
            rotate<T>(x.values[i], x.values[i + 1], turns[i], turns[i + 1]);
          if (amplified) {
            const float factor = args.history_scale[head + v * (kStride / kHeadDim)];
            x.round();
#pragma unroll
            for (int i = 0; i < kSize; ++i) x.values[i] *= factor;
          }
          bits[v] = x.bits();
        }
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        T* to = target.head(destinations, head + v * (kStride / kHeadDim));
        store_bits((kPacked ? to : source + (head + v * (kStride / kHeadDim)) * kHeadDim) + inside,
                   bits[v]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    qk_rmsnorm_rope_any(const QkRmsnormRope args, const Destinations destinations) {
  __shared__ float scratch[2][kWarps];
  int turn = 0;
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
    if (part < 2) {
      const float sum = block_sum<kWarps>(squares, scratch[turn]);
      turn ^= 1;  // only where there was a barrier
      scale = rsqrtf(sum / static_cast<float>(args.width) + args.eps);
    }
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
        rotate<T>(even, odd, rotation[inside], rotation[inside + 1]);
        if (amplified) {
          even = rounded<T>(even) * args.history_scale[head];
          odd = rounded<T>(odd) * args.history_scale[head];
        }
      }
      T* out = target.head(destinations, static_cast<int>(head)) + inside;
      out[0] = from_float<T>(even), out[1] = from_float<T>(odd);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rmsnorm_rows_registers(const RmsnormRows args) {
  constexpr int kSize = Vector<T>::kSize, kVectors = kWidth / kThreads / kSize;
  constexpr int kStride = kThreads * kSize;
  __shared__ float scratch[2][kWarps];
  const T* weights = static_cast<const T*>(args.weight) + threadIdx.x * kSize;
  int turn = 0;
  for (std::int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
      T* here = row_at<T>(args.x, batch, row) + threadIdx.x * kSize;
      Vector<T> x[kVectors];
      float squares = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[v].load(here + v * kStride);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          squares = __fmaf_rn(x[v].values[i], x[v].values[i], squares);
      }
      const float sum = block_sum<kWarps>(squares, scratch[turn]);
      turn ^= 1;
      const float scale = rsqrtf(sum * (1.0f / kWidth) + args.eps);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> weight;
        weight.load(weights + v * kStride);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[v].values[i] = x[v].values[i] * scale * weight.values[i];
        x[v].store(here + v * kStride);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) rmsnorm_rows_any(const RmsnormRows args) {
  __shared__ float scratch[2][kWarps];
  int turn = 0;
  for (std::int64_t index = blockIdx.x; index < args.batch * args.rows; index += gridDim.x) {
    T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    const T* weight = static_cast<const T*>(args.weight);
    float squares = 0.0f;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads)
      squares += to_float(x[i]) * to_float(x[i]);
    const float scale = rsqrtf(
        block_sum<kWarps>(squares, scratch[turn]) / static_cast<float>(args.width) + args.eps);
    turn ^= 1;
    for (std::int64_t i = threadIdx.x; i < args.width; i += kThreads) {
      x[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
    }
  }
}

template <typename T>
int run(const QkRmsnormRope& args, cudaStream_t stream) {
  Destinations destinations{};
  const std::int64_t num_heads = args.width / args.head_dim;
  if (args.packed != nullptr) {
    if (args.num_destinations > kMaxDestinations || num_heads > kMaxHeads)
      return static_cast<int>(cudaErrorInvalidValue);
    destinations.count = args.num_destinations;
    std::int64_t head = 0;
    for (int d = 0; d < args.num_destinations; ++d) {
      const std::int64_t end = head + args.heads_per_destination[d];
      while (head < end) destinations.of_head[head++] = static_cast<std::uint8_t>(d);
      destinations.first_head[d + 1] = end;
    }
  }
  const int num_parts = args.packed == nullptr ? 2 : 3;
  const bool fits = args.width == kWidth && args.head_dim == kHeadDim &&
                    has_aligned_rows(args.qkv, sizeof(T)) && is_aligned(args.q_weight) &&
                    is_aligned(args.k_weight) && is_aligned(args.rotation) &&
                    (args.packed == nullptr || is_aligned(args.packed));
  if (fits) {
    dim3 blocks = grid_for(args.rows, args.batch);
    blocks.y = (blocks.y < 65535 / 3 ? blocks.y : 65535 / 3) * static_cast<unsigned>(num_parts);
    if (args.packed == nullptr) {
      launch(qk_rmsnorm_rope_registers<T, false>, blocks, kThreads, stream, args, destinations);
    } else {
      launch(qk_rmsnorm_rope_registers<T, true>, blocks, kThreads, stream, args, destinations);
    }
  } else {
    const int blocks = grid_for(args.batch * args.rows * num_parts);
    launch(qk_rmsnorm_rope_any<T>, blocks, kThreads, stream, args, destinations);
  }
  return finish();
}

template <typename T>
int run_rows(const RmsnormRows& args, cudaStream_t stream) {
  if (args.width == kWidth && has_aligned_rows(args.x, sizeof(T)) && is_aligned(args.weight)) {
    const dim3 blocks = grid_for(args.rows, args.batch);
    launch(rmsnorm_rows_registers<T>, blocks, kThreads, stream, args);
  } else {
    launch(rmsnorm_rows_any<T>, grid_for(args.batch * args.rows), kThreads, stream, args);
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
