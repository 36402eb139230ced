#include "cpu.h"
#include "patchify.h"

#define HELIOS_DEVICE

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename T>
T from_double(double x) {
  return from_float<T>(static_cast<float>(x));
}

#include "patchify_element.h"

template <typename In, typename Out>
void gather(const PatchGather& args) {
  const int64_t t = args.kernel[0], h = args.kernel[1], w = args.kernel[2];
  const int64_t rows = (args.size[1] + h - 1) / h, columns = (args.size[2] + w - 1) / w;
  const int64_t length = args.channels * t * h * w, total = args.batch * args.num_rows;
  const int64_t* strides = args.latents.strides;
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < total; ++index) {
    const int64_t batch = index / args.num_rows, row = args.first_row + index % args.num_rows;
    const int64_t frame0 = row / (rows * columns) * t, row0 = row / columns % rows * h,
                  column0 = row % columns * w;
    const In* sample = static_cast<const In*>(args.latents.data) + batch * strides[0];
    Out* out = static_cast<Out*>(args.rows) + index * length;
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t dt = 0; dt < t; ++dt) {
        const int64_t frame = frame0 + dt < args.size[0] ? frame0 + dt : args.size[0] - 1;
        for (int64_t dh = 0; dh < h; ++dh) {
          const int64_t y = row0 + dh < args.size[1] ? row0 + dh : args.size[1] - 1;
          const In* line = sample + c * strides[1] + frame * strides[2] + y * strides[3];
          if (strides[4] == 1 && column0 + w <= args.size[2]) {
            for (int64_t dw = 0; dw < w; ++dw)
              *out++ = from_float<Out>(to_float(line[column0 + dw]));
            continue;
          }
          for (int64_t dw = 0; dw < w; ++dw) {
            const int64_t x = column0 + dw < args.size[2] ? column0 + dw : args.size[2] - 1;
            *out++ = from_float<Out>(to_float(line[x * strides[4]]));
          }
        }
      }
    }
  }
}

template <typename V, typename L>
void step(const SolverStep& args) {
  const int64_t index = *args.index;
  const int64_t frames = args.size[0], rows = args.size[1], columns = args.size[2];
  const int64_t planes = args.batch * args.channels * frames;
#pragma omp parallel for schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t t = plane % frames, c = plane / frames % args.channels,
                  b = plane / (frames * args.channels);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < columns; ++x) {
        step_element<V, L>(args, index, (plane * rows + y) * columns + x,
                           velocity_at<V>(args, b, c, t, y, x));
      }
    }
  }
}

template <typename In>
void gather_from(const PatchGather& args) {
  switch (args.rows_dtype) {
    case DType::kFloat32:
      return gather<In, float>(args);
    case DType::kBFloat16:
      return gather<In, BFloat16>(args);
    case DType::kFloat16:
      return gather<In, Float16>(args);
  }
}

template <typename V>
void step_from(const SolverStep& args) {
  if (args.latents_dtype == DType::kFloat32) return step<V, float>(args);
  step<V, V>(args);  // the only other dtype there is: the velocity's own
}

}  // namespace

void patch_gather(const PatchGather& args) noexcept {
  HELIOS_FOR_DTYPE(args.latents_dtype, gather_from, args)
}
void solver_step(const SolverStep& args) noexcept {
  HELIOS_FOR_DTYPE(args.velocity_dtype, step_from, args)
}

}  // namespace HELIOS_ISA
}  // namespace helios
