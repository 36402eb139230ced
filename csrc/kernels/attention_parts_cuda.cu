#include "attention_parts.h"
#include "cuda.cuh"

namespace helios {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSources = 64;

struct Sources {
  int count;
  std::int64_t first_head[kMaxSources + 1];
};

// One block per row and sample; Unit is what is copied at a time.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    unpack(const UnpackHeads args, const Sources sources, std::int64_t units_per_head) {
  const std::int64_t num_heads = sources.first_head[sources.count], total = args.batch * args.rows;
  for (std::int64_t index = blockIdx.x; index < total; index += gridDim.x) {
    const std::int64_t row = index % args.rows, batch = index / args.rows;
    Unit* out = static_cast<Unit*>(args.out) + index * num_heads * units_per_head;
    for (std::int64_t i = threadIdx.x; i < num_heads * units_per_head; i += kThreads) {
      const std::int64_t head = i / units_per_head;
      int source = 0;
      while (head >= sources.first_head[source + 1]) ++source;
      const std::int64_t first = sources.first_head[source],
                         heads = sources.first_head[source + 1] - first;
      const std::int64_t before = args.rows * args.batch * first;
      const std::int64_t from = before + (row * args.batch + batch) * heads + head - first;
      out[i] = static_cast<const Unit*>(args.received)[from * units_per_head + i % units_per_head];
    }
  }
}

template <typename Unit>
int unpack_by(const UnpackHeads& args, const Sources& sources, cudaStream_t stream) {
  const std::int64_t units =
      args.head_dim * args.element_size / static_cast<std::int64_t>(sizeof(Unit));
  launch(unpack<Unit>, grid_for(args.batch * args.rows), kThreads, stream, args, sources, units);
  return finish();
}

// One warp per row, so that a row's two weights are computed once.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge(const MergePartials args) {
  const int lane = threadIdx.x % 32;
  constexpr int kWarps = kThreads / 32;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       row < args.rows; row += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const float own_lse = args.lse[row], other_lse = args.other_lse[row];
    __syncwarp();  // every lane has read lse before one of them writes it
    if (isinf(other_lse) && other_lse < 0) continue;
    const bool is_first = isinf(own_lse) && own_lse < 0;  // then out may hold anything
    const float top = own_lse > other_lse ? own_lse : other_lse;
    const float own = expf(own_lse - top), other = expf(other_lse - top);
    const float total = own + other;
    const float own_share = own / total, other_share = other / total;
    float* out = args.out + row * args.dim;
    const T* rest = static_cast<const T*>(args.other) + row * args.dim;
    for (std::int64_t i = lane; i < args.dim; i += 32)
      out[i] = (is_first ? 0.0f : out[i] * own_share) + to_float(rest[i]) * other_share;
    if (lane == 0) args.lse[row] = top + logf(total);
  }
}

template <typename T>
int run_merge(const MergePartials& args, cudaStream_t stream) {
  launch(merge<T>, grid_for((args.rows + kThreads / 32 - 1) / (kThreads / 32)), kThreads, stream,
         args);
  return finish();
}

}  // namespace

int unpack_heads_cuda(const UnpackHeads& args, void* stream) noexcept {
  if (args.num_sources > kMaxSources) return static_cast<int>(cudaErrorInvalidValue);
  Sources sources{};
  sources.count = args.num_sources;
  for (int s = 0; s < args.num_sources; ++s)
    sources.first_head[s + 1] = sources.first_head[s] + args.heads_per_source[s];
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
