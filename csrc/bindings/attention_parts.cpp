#include "../kernels/attention_parts.h"

#include "ops.h"

namespace helios {

void bind_unpack_heads(const Tensor received, const Tensor out, const Ints heads) {
  UnpackHeads args{};
  dtype_of(out, "out");
  check_same(received, out, "out"), check_dtype(out, received.scalar_type(), "out");
  check_contiguous(received, "received"), check_contiguous(out, "out");
  STD_TORCH_CHECK(out.dim() == 4, "out must be [batch, rows, heads, head_dim]");
  check_numel(received, out.numel(), "received");
  const int64_t total = sum_of_shares(heads);
  STD_TORCH_CHECK(total == out.size(2), "heads must sum to ", out.size(2), ", got ", total);
  args.received = received.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.heads_per_source = heads.data(), args.num_sources = static_cast<int>(heads.size());
  args.batch = out.size(0), args.rows = out.size(1), args.head_dim = out.size(3);
  args.element_size = static_cast<int64_t>(out.element_size());
  if (out.numel() == 0) return;
  launch(out, args, HELIOS_TWINS(unpack_heads));
}

void bind_merge_partials(const Tensor out, const Tensor lse, const Tensor other,
                         const Tensor other_lse) {
  MergePartials args{};
  for (const Tensor* x : {&lse, &other, &other_lse}) check_same(out, *x, "every tensor");
  for (const Tensor* x : {&out, &lse, &other, &other_lse}) check_contiguous(*x, "every tensor");
  for (const Tensor* x : {&out, &lse, &other_lse})
    check_dtype(*x, ScalarType::Float, "out and lse");
  check_shape(out, other, "other"), check_shape(lse, other_lse, "other_lse");
  STD_TORCH_CHECK(out.dim() >= 1 && lse.numel() * out.size(out.dim() - 1) == out.numel(),
                  "lse must be out's rows");
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.other = other.const_data_ptr(), args.dtype = dtype_of(other, "other");
  args.other_lse = static_cast<const float*>(other_lse.const_data_ptr());
  args.rows = lse.numel(), args.dim = out.size(out.dim() - 1);
  if (out.numel() == 0) return;
  launch(out, args, HELIOS_TWINS(merge_partials));
}

}  // namespace helios
