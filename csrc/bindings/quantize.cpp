#include "../kernels/quantize.h"

#include "ops.h"

namespace helios {

void bind_quantize_rows(const Tensor x, const Tensor out, const Tensor scale, bool gelu) {
  QuantizeRows args{};
  args.x = rows_of(x, "x");
  args.dtype = dtype_of(x, "x"), args.gelu = gelu;
  args.batch = x.size(0), args.rows = x.size(1), args.width = x.size(2);
  check_same(x, out, "out"), check_dtype(out, ScalarType::Byte, "out");
  check_contiguous(out, "out"), check_shape(x, out, "out");
  check_same(x, scale, "scale"), check_dtype(scale, ScalarType::Float, "scale");
  check_contiguous(scale, "scale"), check_numel(scale, args.batch * args.rows, "scale");
  args.out = static_cast<std::uint8_t*>(out.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  if (x.numel() == 0) return;
  launch(x, args, HELIOS_TWINS(quantize_rows));
}

}  // namespace helios
