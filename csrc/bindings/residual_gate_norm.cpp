#include "../kernels/residual_gate_norm.h"

#include "ops.h"

namespace helios {
namespace {

// A [2, width] float32 tensor of rows that may be one row seen twice.
const float* segment_rows(const Tensor& x, const Tensor& rows, const char* name, int64_t* stride) {
  check_same(x, rows, name);
  check_dtype(rows, ScalarType::Float, name);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == 2 && rows.size(1) == x.size(2), name,
                  " must be [2, width]");
  STD_TORCH_CHECK(rows.size(1) <= 1 || rows.stride(1) == 1, name,
                  " must have elements side by side");
  *stride = rows.stride(0);
  return static_cast<const float*>(rows.const_data_ptr());
}

}  // namespace

void bind_residual_gate_norm(const Tensor x, const MaybeTensor y, const MaybeTensor gate,
                             const MaybeTensor weight, const MaybeTensor bias,
                             const MaybeTensor out, const MaybeTensor scale, int64_t num_history,
                             double eps) {
  ResidualGateNorm args{};
  args.x = rows_of(x, "x");
  args.dtype = dtype_of(x, "x");
  args.batch = x.size(0), args.rows = x.size(1), args.width = x.size(2);
  args.num_history = num_history, args.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(num_history >= 0 && num_history <= args.rows,
                  "num_history must lie between 0 and ", args.rows, ", got ", num_history);
  if (y.has_value()) {
    check_same(x, *y, "y"), check_shape(x, *y, "y"), check_dtype(*y, x.scalar_type(), "y");
    args.y = rows_of(*y, "y");
    if (gate.has_value()) args.gate = segment_rows(x, *gate, "gate", &args.gate_stride);
  }
  if (out.has_value()) {
    STD_TORCH_CHECK(weight.has_value() && bias.has_value(), "a norm needs weight and bias");
    check_same(x, *out, "out"), check_shape(x, *out, "out"),
        check_dtype(*out, scale.has_value() ? ScalarType::Byte : x.scalar_type(), "out");
    args.out = rows_of(*out, "out");
    args.weight = segment_rows(x, *weight, "weight", &args.weight_stride);
    args.bias = segment_rows(x, *bias, "bias", &args.bias_stride);
  }
  if (scale.has_value()) {
    STD_TORCH_CHECK(out.has_value(), "scales are of an out in 8 bits");
    check_same(x, *scale, "scale"), check_dtype(*scale, ScalarType::Float, "scale");
    args.scale = rows_of(*scale, "scale");
    STD_TORCH_CHECK(
        scale->size(0) == args.batch && scale->size(1) == args.rows && scale->size(2) == 1,
        "scale must be [batch, rows, 1]");
  }
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(residual_gate_norm));
}

}  // namespace helios
