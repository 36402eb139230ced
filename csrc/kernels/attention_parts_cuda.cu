#include "attention_parts.h"
#include "cuda.cuh"

namespace helios {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSources = 64, kMaxHeads = 256;

struct Sources {
  int count;
  std::int64_t first_head[kMaxSources + 1];
  std::uint8_t of_head[kMaxHeads];
};

// One block per row and sample; Unit is what is copied at a time, kUnits of them to a head (0: as
// many as units_per_head says).
template <typename Unit, int kUnits>
__global__ void __launch_bounds__(kThreads)
    unpack(const UnpackHeads args, const Sources sources, int units_per_head) {
  const int units = kUnits > 0 ? kUnits : units_per_head;
  const int num_heads = static_cast<int>(sources.first_head[sources.count]);
  for (std::int64_t batch = blockIdx.y; batch < args.batch; batch += gridDim.y) {
    for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
      const std::int64_t token = row * args.batch + batch, tokens = args.rows * args.batch;
      Unit* out = static_cast<Unit*>(args.out) + (batch * args.rows + row) * num_heads * units;
#pragma unroll(kUnits > 0 ? 5 : 1)
      for (int i = threadIdx.x; i < num_heads * units; i += kThreads) {
        const int head = i / units, source = sources.of_head[head];
        const int first = static_cast<int>(sources.first_head[source]);
        const int heads = static_cast<int>(sources.first_head[source + 1]) - first;
        const std::int64_t from = tokens * first + token * heads + head - first;
        out[i] = static_cast<const Unit*>(args.received)[from * units + i % units];
      }
    }
  }
}

template <typename Unit>
int unpack_by(const UnpackHeads& args, const Sources& sources, cudaStream_t stream) {
  const int units =
      static_cast<int>(args.head_dim * args.element_size / static_cast<std::int64_t>(sizeof(Unit)));
  const dim3 blocks = grid_for(args.rows, args.batch);
  if (units == 16) {  // heads of 128 16-bit numbers
    launch(unpack<Unit, 16>, blocks, kThreads, stream, args, sources, units);
  } else {
    launch(unpack<Unit, 0>, blocks, kThreads, stream, args, sources, units);
  }
  return finish();
}

// What two partials weigh in their sum.
struct Weights {
  float own, other, lse;
  bool is_first;  // the own one saw no key: out may hold anything
};

__device__ __forceinline__ Weights weights_of(float own_lse, float other_lse) {
  const float top = own_lse > other_lse ? own_lse : other_lse;
  const float own = expf(own_lse - top), other = expf(other_lse - top);
  const float inverse = 1.0f / (own + other);
  return {own * inverse, other * inverse, top + logf(own + other), isinf(own_lse) && own_lse < 0};
}

// kLanes lanes a row, eight numbers each.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) merge_rows(const MergePartials args) {
  constexpr int kRows = kThreads / kLanes;
  const int inside = threadIdx.x % kLanes * 8;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows; first < args.rows;
       first += static_cast<std::int64_t>(gridDim.x) * kRows) {
    const std::int64_t row = first + threadIdx.x / kLanes;
    const bool is_real = row < args.rows;
    const float own_lse = is_real ? args.lse[row] : 0.0f;
    const float other_lse = is_real ? args.other_lse[row] : 0.0f;
    __syncwarp();  // every lane has read lse before one of them writes it
    if (!is_real || (isinf(other_lse) && other_lse < 0)) continue;
    float* out = args.out + row * (kLanes * 8) + inside;
    const T* rest = static_cast<const T*>(args.other) + row * (kLanes * 8) + inside;
    float values[8], more[8];
    load_floats<8>(values, out);
    constexpr int kSize = Vector<T>::kSize;
#pragma unroll
    for (int i = 0; i < 8; i += kSize) {
      Vector<T> part;
      part.load(rest + i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) more[i + k] = part.values[k];
    }
    const Weights weights = weights_of(own_lse, other_lse);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = (weights.is_first ? 0.0f : values[i] * weights.own) + more[i] * weights.other;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      Vector<float> part;
#pragma unroll
      for (int k = 0; k < 4; ++k) part.values[k] = values[i + k];
      part.store(out + i);
    }
    if (inside == 0) args.lse[row] = weights.lse;
  }
}

// One warp per row of any width.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_any(const MergePartials args) {
  const int lane = threadIdx.x % 32;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       row < args.rows; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const float own_lse = args.lse[row], other_lse = args.other_lse[row];
    __syncwarp();  // every lane has read lse before one of them writes it
    if (isinf(other_lse) && other_lse < 0) continue;
    const Weights weights = weights_of(own_lse, other_lse);
    float* out = args.out + row * args.dim;
    const T* rest = static_cast<const T*>(args.other) + row * args.dim;
    for (std::int64_t i = lane; i < args.dim; i += 32)
      out[i] = (weights.is_first ? 0.0f : out[i] * weights.own) + to_float(rest[i]) * weights.other;
    if (lane == 0) args.lse[row] = weights.lse;
  }
}

template <typename T>
int run_merge(const MergePartials& args, cudaStream_t stream) {
  const bool fits = is_aligned(args.out) && is_aligned(args.other);
  if (fits && args.dim == 128) {
    const std::int64_t blocks = (args.rows * 16 + kThreads - 1) / kThreads;
    launch(merge_rows<T, 16>, grid_for(blocks), kThreads, stream, args);
  } else {
    launch(merge_any<T>, grid_for((args.rows + kWarps - 1) / kWarps), kThreads, stream, args);
  }
  return finish();
}

}  // namespace

int unpack_heads_cuda(const UnpackHeads& args, void* stream) noexcept {
  Sources sources{};
  if (args.num_sources > kMaxSources) return static_cast<int>(cudaErrorInvalidValue);
  sources.count = args.num_sources;
  std::int64_t head = 0;
  for (int s = 0; s < args.num_sources; ++s) {
    const std::int64_t end = head + args.heads_per_source[s];
    if (end > kMaxHeads) return static_cast<int>(cudaErrorInvalidValue);
    while (head < end) sources.of_head[head++] = static_cast<std::uint8_t>(s);
    sources.first_head[s + 1] = end;
  }
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.head_dim * args.element_size % 16 == 0 && is_aligned(args.received) &&
      is_aligned(args.out)) {
    return unpack_by<uint4>(args, sources, on);
  }
  return args.element_size == 4 ? unpack_by<std::uint32_t>(args, sources, on)
                                : unpack_by<std::uint16_t>(args, sources, on);
}

int merge_partials_cuda(const MergePartials& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, run_merge, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
