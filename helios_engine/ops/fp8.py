"""Linear layers in 8-bit floating point (e4m3): one scale per row of either operand. Approximate, so asked for by name.

# M rows, D in, F out
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helios_engine.ops import native as ops
from helios_engine.ops.reference import EightBitRows


def refusal(device: torch.device, dtype: torch.dtype, widths: Sequence[int] = ()) -> str | None:
    """Why 8-bit products cannot run there, or None. On the CPU they are emulated, for tests."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "products with a scale per row need a Hopper GPU (sm_90) or newer"
    if dtype != torch.bfloat16:
        return f"its products come out in bfloat16, but the model computes in {str(dtype).removeprefix('torch.')}"
    if odd := [width for width in widths if width % 16]:
        return f"its products need widths that are multiples of 16, this model has {odd[0]}"
    return _trial(device)


@functools.cache
def _trial(device: torch.device) -> str | None:
    """What a small product says on this device where it cannot run: not every newer GPU has scales per row."""
    ones = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:  # as attention's trials
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a trial of its products fails: {' '.join(str(error).split())[:200]}"
    return None


class Fp8Linear(nn.Module):
    """A linear layer whose weight is kept in e4m3; the activations are rounded row by row as they come."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows = ops.quantize_rows(linear.weight.data[None])
        self.weight_FD = nn.Parameter(rows.values[0], requires_grad=False)
        self.scale_F = nn.Parameter(rows.scale.view(-1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor | EightBitRows, out: Tensor | None = None) -> Tensor:
        """x weight^T + bias for rows [B, L, D], in the bias's dtype; out may be some rows of a larger tensor."""
        weight_FD, scale_F, bias = self.weight_FD, self.scale_F, self.bias
        rows = x if isinstance(x, EightBitRows) else ops.quantize_rows(x)
        values, scale_M1 = rows.values.flatten(0, 1), rows.scale.flatten(0, 1)
        if not scale_M1.is_meta and scale_M1.data_ptr() % 16:  # some rows of a buffer; libraries want whole vectors
            scale_M1 = scale_M1.clone()
        in_place = {"out": out[0]} if out is not None and rows.shape[0] == 1 and ops.is_gpu(values.device) else {}
        if ops.is_gpu(values.device):
            result = torch._scaled_mm(
                values,
                weight_FD.t(),
                scale_a=scale_M1,
                scale_b=scale_F[None],
                bias=bias,
                out_dtype=bias.dtype,
                use_fast_accum=True,
                **in_place,
            )
        else:
            exact = (values.float() * scale_M1) @ (weight_FD.float() * scale_F[:, None]).t()
            result = (exact + bias.float()).to(bias.dtype)
        if in_place:
            return out
        result = result.view(*rows.shape[:-1], weight_FD.size(0))
        return result if out is None else out.copy_(result)
