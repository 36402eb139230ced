#include "lanes.h"
#include "qk_rmsnorm_rope.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
  const float squares = sum_of(width, [=](auto kind, int64_t i) {
    typedef typename decltype(kind)::type V;
    return load<V>(x + i) * load<V>(x + i);
  });
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

constexpr int64_t kChunk = 256;  // elements of a head worked on at a time

// A row's angles as every head needs them: pairs (e, o) become e * along[e] + o * across[e] and
// o * along[o] + e * across[o].
struct Turns {
  float along[kChunk], across[kChunk];
};

int64_t chunk_of(int64_t left) { return left < kChunk ? left : kChunk; }

Turns spread(const float* rotation, int64_t count) {
  Turns turns;
  for (int64_t i = 0; i < count; i += 2) {
    turns.along[i] = turns.along[i + 1] = rotation[i];
    turns.across[i] = -rotation[i + 1];
    turns.across[i + 1] = rotation[i + 1];
  }
  return turns;
}

HELIOS_INLINE Lanes swap_pairs(Lanes x) {
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

// A head's elements, or kChunk of them: x -> out, normalised, turned and scaled. x and out may be
// the same.
template <typename T>
HELIOS_INLINE void turn_head(const T* x, T* out, const T* weight, float scale, const Turns& turns,
                             float amplify, int64_t count, int64_t ahead) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(x + ahead + i);
    const Lanes normed = rounded_to<T>(load<Lanes>(x + i) * scale * load<Lanes>(weight + i));
    Lanes turned =
        normed * load<Lanes>(turns.along + i) + swap_pairs(normed) * load<Lanes>(turns.across + i);
    if (amplify != 1.0f) turned = rounded_to<T>(turned) * amplify;
    store(out + i, turned);
  }
  for (; i < count; i += 2) {
    float normed[2];
    for (int64_t k = 0; k < 2; ++k)
      normed[k] = rounded_to<T>(to_float(x[i + k]) * scale * to_float(weight[i + k]));
    for (int64_t k = 0; k < 2; ++k) {
      float turned = normed[k] * turns.along[i + k] + normed[1 - k] * turns.across[i + k];
      if (amplify != 1.0f) turned = rounded_to<T>(turned) * amplify;
      store(out + i + k, turned);
    }
  }
}

template <typename T>
void finish_row(const QkRmsnormRope& args, int64_t batch, int64_t row) {
  T* qkv = row_at<T>(args.qkv, batch, row);
  const float* rotation = args.rotation + row * args.head_dim;
  const int64_t num_heads = args.width / args.head_dim, first_count = chunk_of(args.head_dim);
  const Turns first = spread(rotation, first_count);
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
      const float amplify = amplified ? args.history_scale[head] : 1.0f;
      const T *head_x = x + head * args.head_dim, *head_weight = weight + head * args.head_dim;
      turn_head(head_x, out, head_weight, scale, first, amplify, first_count, args.qkv.row_stride);
      for (int64_t i = first_count; i < args.head_dim; i += kChunk) {
        const int64_t count = chunk_of(args.head_dim - i);
        const Turns turns = spread(rotation + i, count);
        turn_head(head_x + i, out + i, head_weight + i, scale, turns, amplify, count,
                  args.qkv.row_stride);
      }
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
    for_each(args.width, [=](auto kind, int64_t i) {
      typedef typename decltype(kind)::type V;
      store(x + i, load<V>(x + i) * scale * load<V>(weight + i));
    });
  }
}

}  // namespace

void qk_rmsnorm_rope(const QkRmsnormRope& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run, args) }
void rmsnorm_rows(const RmsnormRows& args) noexcept { HELIOS_FOR_DTYPE(args.dtype, run_rows, args) }

}  // namespace HELIOS_ISA
}  // namespace helios
