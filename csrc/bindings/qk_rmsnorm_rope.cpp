#include "../kernels/qk_rmsnorm_rope.h"

#include "ops.h"

namespace helios {
namespace {

QkRmsnormRope common(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                     const Tensor& rotation, const MaybeTensor& history_scale, int64_t num_history,
                     int64_t first_query, double eps) {
  QkRmsnormRope args{};
  args.qkv = rows_of(qkv, "qkv");
  args.dtype = dtype_of(qkv, "qkv");
  args.batch = qkv.size(0), args.rows = qkv.size(1), args.width = qkv.size(2) / 3;
  args.num_history = num_history, args.first_query = first_query,
  args.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(qkv.size(2) % 3 == 0, "qkv must hold three parts side by side, got width ",
                  qkv.size(2));
  for (const Tensor* weight : {&q_weight, &k_weight}) {
    check_same(qkv, *weight, "weight"), check_dtype(*weight, qkv.scalar_type(), "weight");
    check_contiguous(*weight, "weight"), check_numel(*weight, args.width, "weight");
  }
  args.q_weight = q_weight.const_data_ptr(), args.k_weight = k_weight.const_data_ptr();
  check_same(qkv, rotation, "rotation"), check_dtype(rotation, ScalarType::Float, "rotation");
  check_contiguous(rotation, "rotation");
  STD_TORCH_CHECK(rotation.dim() == 3 && rotation.size(0) == args.rows && rotation.size(2) == 2,
                  "rotation must be [rows, head_dim / 2, 2]");
  args.head_dim = rotation.size(1) * 2;
  STD_TORCH_CHECK(args.head_dim > 0 && args.width % args.head_dim == 0, "width ", args.width,
                  " must be a multiple of the head size ", args.head_dim);
  args.rotation = static_cast<const float*>(rotation.const_data_ptr());
  STD_TORCH_CHECK(num_history >= 0 && num_history <= args.rows,
                  "num_history must lie between 0 and ", args.rows);
  STD_TORCH_CHECK(first_query >= 0 && first_query <= args.rows,
                  "first_query must lie between 0 and ", args.rows);
  if (history_scale.has_value()) {
    check_same(qkv, *history_scale, "history_scale"),
        check_contiguous(*history_scale, "history_scale");
    check_dtype(*history_scale, ScalarType::Float, "history_scale");
    check_numel(*history_scale, args.width / args.head_dim, "history_scale");
    args.history_scale = static_cast<const float*>(history_scale->const_data_ptr());
  }
  return args;
}

}  // namespace

void bind_qk_rmsnorm_rope(const Tensor qkv, const Tensor q_weight, const Tensor k_weight,
                          const Tensor rotation, const MaybeTensor history_scale,
                          int64_t num_history, int64_t first_query, double eps) {
  const QkRmsnormRope args =
      common(qkv, q_weight, k_weight, rotation, history_scale, num_history, first_query, eps);
  if (qkv.numel() == 0) return;
  launch(qkv, args, HELIOS_TWINS(qk_rmsnorm_rope));
}

void bind_qk_rmsnorm_rope_pack(const Tensor qkv, const Tensor q_weight, const Tensor k_weight,
                               const Tensor rotation, const MaybeTensor history_scale,
                               const Tensor packed, const Ints heads, int64_t num_history,
                               int64_t first_query, double eps) {
  QkRmsnormRope args =
      common(qkv, q_weight, k_weight, rotation, history_scale, num_history, first_query, eps);
  check_same(qkv, packed, "packed"), check_dtype(packed, qkv.scalar_type(), "packed");
  check_contiguous(packed, "packed"), check_numel(packed, qkv.numel(), "packed");
  const int64_t total = sum_of_shares(heads);
  STD_TORCH_CHECK(total * args.head_dim == args.width, "heads must sum to ",
                  args.width / args.head_dim, ", got ", total);
  args.packed = packed.mutable_data_ptr();
  args.heads_per_destination = heads.data(), args.num_destinations = static_cast<int>(heads.size());
  if (qkv.numel() == 0) return;
  launch(qkv, args, HELIOS_TWINS(qk_rmsnorm_rope));
}

void bind_rmsnorm_rows(const Tensor x, const Tensor weight, double eps) {
  RmsnormRows args{};
  args.x = rows_of(x, "x");
  args.dtype = dtype_of(x, "x");
  args.batch = x.size(0), args.rows = x.size(1), args.width = x.size(2),
  args.eps = static_cast<float>(eps);
  check_same(x, weight, "weight"), check_dtype(weight, x.scalar_type(), "weight");
  check_contiguous(weight, "weight"), check_numel(weight, args.width, "weight");
  args.weight = weight.const_data_ptr();
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(rmsnorm_rows));
}

}  // namespace helios
