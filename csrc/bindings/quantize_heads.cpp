#include "../kernels/quantize_heads.h"

#include "ops.h"

namespace helios {
namespace {

// [batch, rows, heads, head_dim] whose heads lie side by side in a row.
HeadRows head_rows_of(const Tensor& x, const Tensor& out, const Tensor& scale, const Tensor& like,
                      const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [batch, rows, heads, head_dim]");
  STD_TORCH_CHECK(
      x.size(0) == like.size(0) && x.size(2) == like.size(2) && x.size(3) == like.size(3), name,
      " must have the batch, heads and head size of q");
  STD_TORCH_CHECK(
      (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(3)), name,
      " must have rows whose heads lie side by side");
  check_same(like, x, name), check_dtype(x, like.scalar_type(), name);
  check_same(like, out, name), check_dtype(out, ScalarType::Byte, name);
  check_contiguous(out, name), check_shape(x, out, name);
  check_same(like, scale, "scale"), check_dtype(scale, ScalarType::Float, "scale");
  check_contiguous(scale, "scale"), check_numel(scale, x.size(0) * x.size(2), "scale");
  return {{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)},
          static_cast<std::uint8_t*>(out.mutable_data_ptr()),
          static_cast<float*>(scale.mutable_data_ptr()),
          x.size(1)};
}

}  // namespace

void bind_quantize_heads(const Tensor q, const Tensor k, const Tensor v, const Tensor q_out,
                         const Tensor k_out, const Tensor v_out, const Tensor q_scale,
                         const Tensor k_scale, const Tensor v_scale, const Tensor workspace) {
  QuantizeHeads args{};
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(q.dim() == 4, "q must be [batch, rows, heads, head_dim]");
  args.batch = q.size(0), args.heads = q.size(2), args.head_dim = q.size(3);
  args.parts[0] = head_rows_of(q, q_out, q_scale, q, "q");
  args.parts[1] = head_rows_of(k, k_out, k_scale, q, "k");
  args.parts[2] = head_rows_of(v, v_out, v_scale, q, "v");
  check_same(q, workspace, "workspace"), check_dtype(workspace, ScalarType::Float, "workspace");
  check_contiguous(workspace, "workspace");
  check_numel(workspace, 3 * args.batch * args.heads * kHeadParts, "workspace");
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  if (args.batch * args.heads * args.head_dim == 0) return;
  launch(q, args, HELIOS_TWINS(quantize_heads));
}

}  // namespace helios
