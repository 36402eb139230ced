#include "fp8.cuh"
#include "quantize_heads.h"

namespace helios {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Which of q, k and v, and which sample, a block's second index names.
struct Which {
  int part;
  int64_t batch;
};
__device__ __forceinline__ Which which(unsigned index) {
  return {static_cast<int>(index % 3), index / 3};
}

__device__ __forceinline__ float* tops_at(const QuantizeHeads& args, const Which& at,
                                          int64_t head) {
  return args.workspace + ((at.part * args.batch + at.batch) * args.heads + head) * kHeadParts;
}

// A head's largest magnitude from its parts', at least kLeastTop; the same on all lanes.
__device__ __forceinline__ float whole_top(const float* tops) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeadParts; i += 32) top = larger(top, tops[i + threadIdx.x % 32]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    top = larger(top, __shfl_xor_sync(0xffffffffu, top, step));
  return top < kLeastTop ? kLeastTop : top;
}

// Warps take heads in turns: kUnit elements a lane, lanes of a head side by side. kUnit is a whole
// vector or 1; kHeadDim is the head's size, or 0 where it is not known before.
template <typename T, int kUnit>
__device__ __forceinline__ float top_at(const T* x) {
  if constexpr (kUnit == 1) {
    return fabsf(to_float(*x));
  } else {
    const uint4 bits[1] = {load_bits(x)};
    return top_of<T>(bits);
  }
}

// The first row of a part, and how many units its rows have in one head.
struct Share {
  int64_t first;
  int total;
};
__device__ __forceinline__ Share share_of(const HeadRows& heads, int part, int units) {
  const int64_t share = (heads.rows + kHeadParts - 1) / kHeadParts;
  const int64_t first = part * share, last = min(first + share, heads.rows);
  return {first, last > first ? static_cast<int>(last - first) * units : 0};
}

// The largest magnitude of every head among the rows of one part.
template <typename T, int kUnit, int kHeadDim>
__global__ void __launch_bounds__(kThreads) tops_of_parts(const QuantizeHeads args) {
  const Which at = which(blockIdx.y);
  const HeadRows& heads = args.parts[at.part];
  const int lane = threadIdx.x % 32,
            head_dim = kHeadDim > 0 ? kHeadDim : static_cast<int>(args.head_dim);
  const int units = head_dim / kUnit;
  for (int64_t head = threadIdx.x / 32; head < args.heads; head += kWarps) {
    for (int part = blockIdx.x; part < kHeadParts; part += gridDim.x) {
      const auto [first, total] = share_of(heads, part, units);
      float top = 0.0f;
      const T* x = row_at<T>(heads.x, at.batch, first) + head * head_dim;
#pragma unroll(kHeadDim > 0 ? 4 : 1)
      for (int i = lane; i < total; i += 32)
        top = larger(top, top_at<T, kUnit>(x + i / units * heads.x.row_stride + i % units * kUnit));
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        top = larger(top, __shfl_xor_sync(0xffffffffu, top, step));
      if (lane == 0) tops_at(args, at, head)[part] = top;
    }
  }
}

template <typename T, int kUnit, int kHeadDim>
__global__ void __launch_bounds__(kThreads) quantize_parts(const QuantizeHeads args) {
  const Which at = which(blockIdx.y);
  const HeadRows& heads = args.parts[at.part];
  const int lane = threadIdx.x % 32,
            head_dim = kHeadDim > 0 ? kHeadDim : static_cast<int>(args.head_dim);
  const int units = head_dim / kUnit;
  for (int64_t head = threadIdx.x / 32; head < args.heads; head += kWarps) {
    const float top = whole_top(tops_at(args, at, head));
    const float factor = kLargestE4m3 / top;
    if (blockIdx.x == 0 && lane == 0)
      heads.scale[at.batch * args.heads + head] = top / kLargestE4m3;
    for (int part = blockIdx.x; part < kHeadParts; part += gridDim.x) {
      const auto [first, total] = share_of(heads, part, units);
      const int64_t width = args.heads * head_dim;
      const T* x = row_at<T>(heads.x, at.batch, first) + head * head_dim;
      std::uint8_t* out = heads.out + (at.batch * heads.rows + first) * width + head * head_dim;
#pragma unroll(kHeadDim > 0 ? 4 : 1)
      for (int i = lane; i < total; i += 32) {
        const int64_t row = i / units, inside = i % units * kUnit;
        const T* from = x + row * heads.x.row_stride + inside;
        std::uint8_t* to = out + row * width + inside;
        if constexpr (kUnit == 1) {
          *to = static_cast<std::uint8_t>(e4m3_pair(to_float(*from) * factor, 0.0f) & 0xff);
        } else {
          Vector<T> values;
          values.load(from);
          store_e4m3<kUnit>(to, values.values, factor);
        }
      }
    }
  }
}

template <typename T>
int run(const QuantizeHeads& args, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize;
  bool fits = args.head_dim % kSize == 0;
  for (const HeadRows& part : args.parts)
    fits = fits && has_aligned_rows(part.x, sizeof(T)) && is_aligned(part.out);
  if (args.batch * 3 > 65535) return static_cast<int>(cudaErrorInvalidValue);
  dim3 blocks = grid_for(kHeadParts, 1);
  blocks.y = static_cast<unsigned>(3 * args.batch);  // every one of them is needed
  if (fits && args.head_dim == 128) {
    launch(tops_of_parts<T, kSize, 128>, blocks, kThreads, stream, args);
    launch(quantize_parts<T, kSize, 128>, blocks, kThreads, stream, args);
  } else if (fits) {
    launch(tops_of_parts<T, kSize, 0>, blocks, kThreads, stream, args);
    launch(quantize_parts<T, kSize, 0>, blocks, kThreads, stream, args);
  } else {
    launch(tops_of_parts<T, 1, 0>, blocks, kThreads, stream, args);
    launch(quantize_parts<T, 1, 0>, blocks, kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int quantize_heads_cuda(const QuantizeHeads& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
