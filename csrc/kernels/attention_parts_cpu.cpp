#include "attention_parts.h"
#include "cpu.h"

namespace helios {
namespace HELIOS_ISA {
namespace {

template <typename T>
void merge(const MergePartials& args) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < args.rows; ++row) {
    const float own_lse = args.lse[row], other_lse = args.other_lse[row];
    if (isinf(other_lse) && other_lse < 0) continue;
    const bool is_first = isinf(own_lse) && own_lse < 0;  // then out may hold anything
    const float top = own_lse > other_lse ? own_lse : other_lse;
    const float own = expf(own_lse - top), other = expf(other_lse - top);
    const float total = own + other;
    const float own_share = own / total, other_share = other / total;
    float* out = args.out + row * args.dim;
    const T* rest = static_cast<const T*>(args.other) + row * args.dim;
#pragma omp simd
    for (int64_t i = 0; i < args.dim; ++i)
      out[i] = (is_first ? 0.0f : out[i] * own_share) + to_float(rest[i]) * other_share;
    args.lse[row] = top + logf(total);
  }
}

}  // namespace

void unpack_heads(const UnpackHeads& args) noexcept {
  int64_t num_heads = 0;
  for (int source = 0; source < args.num_sources; ++source)
    num_heads += args.heads_per_source[source];
  const int64_t head_bytes = args.head_dim * args.element_size;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      char* out = static_cast<char*>(args.out) + (batch * args.rows + row) * num_heads * head_bytes;
      const char* from = static_cast<const char*>(args.received);
      for (int source = 0; source < args.num_sources; ++source) {
        const int64_t bytes = args.heads_per_source[source] * head_bytes;
        memcpy(out, from + (row * args.batch + batch) * bytes, bytes);
        out += bytes;
        from += args.rows * args.batch * bytes;
      }
    }
  }
}

void merge_partials(const MergePartials& args) noexcept {
  HELIOS_FOR_DTYPE(args.dtype, merge, args)
}

}  // namespace HELIOS_ISA
}  // namespace helios
