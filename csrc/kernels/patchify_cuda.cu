#include "cuda.cuh"
#include "patchify.h"

#define HELIOS_DEVICE __device__

namespace helios {
namespace {

using std::int64_t;

#include "patchify_element.h"

constexpr int kThreads = 256;

inline int blocks_for(int64_t items) { return grid_for((items + kThreads - 1) / kThreads); }

// One thread per element of the rows; neighbours write side by side.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) gather(const PatchGather args) {
  const int64_t t = args.kernel[0], h = args.kernel[1], w = args.kernel[2];
  const int64_t rows = (args.size[1] + h - 1) / h, columns = (args.size[2] + w - 1) / w;
  const int64_t length = args.channels * t * h * w, total = args.batch * args.num_rows * length;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t place = i % length, index = i / length;
    const int64_t batch = index / args.num_rows, row = args.first_row + index % args.num_rows;
    const int64_t c = place / (t * h * w), dt = place / (h * w) % t, dh = place / w % h,
                  dw = place % w;
    const int64_t frame = min(row / (rows * columns) * t + dt, args.size[0] - 1);
    const int64_t y = min(row / columns % rows * h + dh, args.size[1] - 1);
    const int64_t x = min(row % columns * w + dw, args.size[2] - 1);
    const int64_t* strides = args.latents.strides;
    const int64_t from =
        batch * strides[0] + c * strides[1] + frame * strides[2] + y * strides[3] + x * strides[4];
    static_cast<Out*>(args.rows)[i] =
        from_float<Out>(to_float(static_cast<const In*>(args.latents.data)[from]));
  }
}

template <typename V, typename L>
__global__ void __launch_bounds__(kThreads) step(const SolverStep args) {
  const int64_t index = *args.index;
  const int64_t frames = args.size[0], rows = args.size[1], columns = args.size[2];
  const int64_t total = args.batch * args.channels * frames * rows * columns;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t x = i % columns, y = i / columns % rows, t = i / (columns * rows) % frames;
    const int64_t c = i / (columns * rows * frames) % args.channels,
                  b = i / (columns * rows * frames * args.channels);
    step_element<V, L>(args, index, i, velocity_at<V>(args, b, c, t, y, x));
  }
}

template <typename In, typename Out>
int gather_to(const PatchGather& args, cudaStream_t stream) {
  const int64_t length = args.channels * args.kernel[0] * args.kernel[1] * args.kernel[2];
  launch(gather<In, Out>, blocks_for(args.batch * args.num_rows * length), kThreads, stream, args);
  return finish();
}

template <typename In>
int run_gather(const PatchGather& args, cudaStream_t stream) {
  switch (args.rows_dtype) {
    case DType::kFloat32:
      return gather_to<In, float>(args, stream);
    case DType::kBFloat16:
      return gather_to<In, BFloat16>(args, stream);
    case DType::kFloat16:
      return gather_to<In, Float16>(args, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename V, typename L>
int step_to(const SolverStep& args, cudaStream_t stream) {
  const int64_t total = args.batch * args.channels * args.size[0] * args.size[1] * args.size[2];
  launch(step<V, L>, blocks_for(total), kThreads, stream, args);
  return finish();
}

template <typename V>
int run_step(const SolverStep& args, cudaStream_t stream) {
  if (args.latents_dtype == DType::kFloat32) return step_to<V, float>(args, stream);
  return step_to<V, V>(args, stream);
}

}  // namespace

int patch_gather_cuda(const PatchGather& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.latents_dtype, run_gather, args, static_cast<cudaStream_t>(stream))
}

int solver_step_cuda(const SolverStep& args, void* stream) noexcept {
  HELIOS_FOR_DTYPE(args.velocity_dtype, run_step, args, static_cast<cudaStream_t>(stream))
}

}  // namespace helios
