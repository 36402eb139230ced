#include "cpu.h"
#include "qk_rmsnorm_rope.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

constexpr int64_t kChunk = 256;  // elements of a head worked on at a time

template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += to_float(x[i]) * to_float(x[i]);
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

// One head's elements: x -> out, normalised, turned and scaled. x and out may be the same.
template <typename T>
void turn_head(const T* x, T* out, const T* weight, float scale, const float* rotation,
               float amplify, int64_t head_dim) {
  float normed[kChunk];
  for (int64_t start = 0; start < head_dim; start += kChunk) {
    const int64_t count = head_dim - start < kChunk ? head_dim - start : kChunk;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      normed[i] =
          to_float(from_float<T>(to_float(x[start + i]) * scale * to_float(weight[start + i])));
    }
    const float* turns = rotation + start;
    float turned[kChunk];
#pragma omp simd
    for (int64_t i = 0; i < count / 2; ++i) {
      const float even = normed[2 * i], odd = normed[2 * i + 1];
      const float cosine = turns[2 * i], sine = turns[2 * i + 1];
      turned[2 * i] = even * cosine - odd * sine;
      turned[2 * i + 1] = even * sine + odd * cosine;
    }
    // Loops of their own: the pairs vectorise in float32 only.
    if (amplify != 1.0f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) turned[i] = to_float(from_float<T>(turned[i])) * amplify;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[start + i] = from_float<T>(turned[i]);
  }
}

template <typename T>
void finish_row(const QkRmsnormRope& args, int64_t batch, int64_t row) {
  T* qkv = row_at<T>(args.qkv, batch, row);
  const float* rotation = args.rotation + row * args.head_dim;
  const int64_t num_heads = args.width / args.head_dim;
  const int num_parts = args.packed == nullptr ? 2 : 3;
  for (int part = row < args.first_query ? 1 : 0; part < num_parts; ++part) {
    T* x = qkv + part * args.width;
    const T* weight = static_cast<const T*>(part == 0 ? args.q_weight : args.k_weight);
    const float scale = part == 2 ? 1.0f : inverse_rms(x, args.width, args.eps);
    const bool amplified = part == 1 && args.history_scale != nullptr && row < args.num_history;
    int destination = 0;
    int64_t first_head = 0,
            before = 0;  // of this destination; elements before its part of the buffer
    for (int64_t head = 0; head < num_heads; ++head) {
      T* out = x + head * args.head_dim;
      if (args.packed != nullptr) {
        while (head - first_head >= args.heads_per_destination[destination]) {
          const int64_t heads = args.heads_per_destination[destination++];
          first_head += heads;
          before += args.rows * args.batch * 3 * heads * args.head_dim;
        }
        const int64_t heads = args.heads_per_destination[destination];
        const int64_t slot = ((row * args.batch + batch) * 3 + part) * heads + (head - first_head);
        out = static_cast<T*>(args.packed) + before + slot * args.head_dim;
      }
      if (part == 2) {
        memcpy(out, x + head * args.head_dim, args.head_dim * sizeof(T));
        continue;
      }
      turn_head(x + head * args.head_dim, out, weight + head * args.head_dim, scale, rotation,
                amplified ? args.history_scale[head] : 1.0f, args.head_dim);
    }
  }
}

template <typename T>
void run(const QkRmsnormRope& args) {
  const int64_t total = args.batch * args.rows;
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < total; ++index)
    finish_row<T>(args, index / args.rows, index % args.rows);
}

template <typename T>
void run_rows(const RmsnormRows& args) {
  const int64_t total = args.batch * args.rows;
  const T* weight = static_cast<const T*>(args.weight);
#pragma omp parallel for schedule(static)
  for (int64_t index = 0; index < total; ++index) {
    T* x = row_at<T>(args.x, index / args.rows, index % args.rows);
    const float scale = inverse_rms(x, args.width, args.eps);
#pragma omp simd
    for (int64_t i = 0; i < args.width; ++i)
      x[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
  }
}

}  // namespace

void qk_rmsnorm_rope(const QkRmsnormRope& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run, args) }
void rmsnorm_rows(const RmsnormRows& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run_rows, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
