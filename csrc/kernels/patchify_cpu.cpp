#include "lanes.h"
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

constexpr int64_t kLineElements =
    kMaxPatchWidth;  // of a line converted at a time: 8 KB on the stack

// A line's patches, kWidth elements of each, from side by side to rows that lie length apart.
template <typename Out, int64_t kWidth>
void scatter(const Out* line, Out* out, int64_t patches, int64_t length) {
  for (int64_t i = 0; i < patches; ++i)
    memcpy(out + i * length, line + i * kWidth, kWidth * sizeof(Out));
}

template <typename Out>
void scatter(const Out* line, Out* out, int64_t patches, int64_t length, int64_t width) {
  if (width == 2) return scatter<Out, 2>(line, out, patches, length);
  if (width == 4) return scatter<Out, 4>(line, out, patches, length);
  if (width == 8) return scatter<Out, 8>(line, out, patches, length);
  for (int64_t i = 0; i < patches; ++i)
    memcpy(out + i * length, line + i * width, width * sizeof(Out));
}

// Two lines of the same patches of two columns, whose elements are neighbours in a row.
template <typename Out>
void scatter_two(const Out* upper, const Out* lower, Out* out, int64_t patches, int64_t length) {
  for (int64_t i = 0; i < patches; ++i) {
    Out both[4];
    memcpy(both, upper + 2 * i, 2 * sizeof(Out));
    memcpy(both + 2, lower + 2 * i, 2 * sizeof(Out));
    memcpy(out + i * length, both, sizeof both);
  }
}

// Columns [first, first + elements) of a line in the dtype of the rows, its last one repeated
// behind its end.
template <typename In, typename Out>
void convert(const PatchGather& args, const In* line, int64_t first, int64_t elements, Out* to) {
  const int64_t stride = args.latents.strides[4];
  const int64_t inside = first + elements <= args.size[2] ? elements : args.size[2] - first;
  if (stride == 1) {
    const In* from = line + first;
    // A channel's next lines of patches lie right behind, but far from what is read next.
    const In* ahead = from + args.kernel[1] * args.latents.strides[3];
    for_each(inside, [=](auto kind, int64_t x) {
      typedef typename decltype(kind)::type V;
      __builtin_prefetch(ahead + x);
      store(to + x, load<V>(from + x));
    });
  } else {
    for (int64_t x = 0; x < inside; ++x)
      to[x] = from_float<Out>(to_float(line[(first + x) * stride]));
  }
  for (int64_t x = inside; x < elements; ++x)
    to[x] = from_float<Out>(to_float(line[(args.size[2] - 1) * stride]));
}

// The lines of one channel and frame for some patches of a band, columns from first on. Lines are
// converted as a whole, in vectors, and then handed out.
template <typename In, typename Out>
void gather_lines(const PatchGather& args, const In* frame, int64_t band, int64_t first,
                  int64_t patches, Out* out, int64_t length) {
  const int64_t height = args.kernel[1], width = args.kernel[2];
  const auto line_at = [&](int64_t dh) {
    const int64_t row = band * height + dh;
    return frame + (row < args.size[1] ? row : args.size[1] - 1) * args.latents.strides[3];
  };
  Out upper[kLineElements], lower[kLineElements];
  const int64_t at_once = kLineElements / width;
  for (int64_t start = 0; start < patches; start += at_once) {
    const int64_t count = start + at_once < patches ? at_once : patches - start;
    const int64_t column = first + start * width;
    Out* to = out + start * length;
    if (height == 2 && width == 2) {
      convert(args, line_at(0), column, count * width, upper);
      convert(args, line_at(1), column, count * width, lower);
      scatter_two(upper, lower, to, count, length);
      continue;
    }
    for (int64_t dh = 0; dh < height; ++dh) {
      convert(args, line_at(dh), column, count * width, upper);
      scatter(upper, to + dh * width, count, length, width);
    }
  }
}

// A row of patches at a time: its lines are read from end to end, and what they fill fits the
// cache.
template <typename In, typename Out>
void gather(const PatchGather& args) {
  const int64_t t = args.kernel[0], h = args.kernel[1], w = args.kernel[2];
  const int64_t rows = (args.size[1] + h - 1) / h, columns = (args.size[2] + w - 1) / w;
  const int64_t length = args.channels * t * h * w, last_row = args.first_row + args.num_rows;
  const int64_t first_band = args.first_row / columns,
                bands = args.num_rows == 0 ? 0 : (last_row + columns - 1) / columns - first_band;
  const int64_t* strides = args.latents.strides;
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < args.batch * bands; ++index) {
    const int64_t batch = index / bands, band = first_band + index % bands;
    const int64_t begin = band * columns > args.first_row ? band * columns : args.first_row;
    const int64_t end = (band + 1) * columns < last_row ? (band + 1) * columns : last_row;
    const In* sample = static_cast<const In*>(args.latents.data) + batch * strides[0];
    Out* out =
        static_cast<Out*>(args.rows) + (batch * args.num_rows + begin - args.first_row) * length;
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t dt = 0; dt < t; ++dt) {
        const int64_t frame = band / rows * t + dt;
        const In* from = sample + c * strides[1] +
                         (frame < args.size[0] ? frame : args.size[0] - 1) * strides[2];
        gather_lines(args, from, band % rows, (begin - band * columns) * w, end - begin,
                     out + (c * t + dt) * h * w, length);
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
