"""The meaning of each operator in plain torch, with the reference's roundings.

# B batch, L tokens, H heads, K head dim, D width (H * K), S segments: row 0 history, row 1 noisy

On the CPU the work goes through a few rows at a time, so that float32 temporaries stay in cache: 5120 wide, 2940 rows,
bfloat16, two cores, a gated residual takes 6 ms that way against 106 ms for whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_BLOCK_ELEMENTS = 128 * 5120


@dataclass(frozen=True, slots=True)
class EightBitRows:
    """Rows [B, L, D] in e4m3 with a float32 scale each, [B, L, 1]; a row is nearly values * scale."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def empty_like(x_BLD: Tensor) -> EightBitRows:
        """As many rows, of anything."""
        values = x_BLD.new_empty(x_BLD.shape, dtype=torch.float8_e4m3fn)
        return EightBitRows(values, x_BLD.new_empty((*x_BLD.shape[:-1], 1), dtype=torch.float32))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, rows: tuple[slice, ...]) -> EightBitRows:
        """Some of the rows, which stay where they are."""
        return EightBitRows(self.values[rows], self.scale[rows])

    def clone(self) -> EightBitRows:
        return EightBitRows(self.values.clone(), self.scale.clone())


def _row_blocks(x_BLD: Tensor, start: int, end: int) -> Iterator[slice]:
    if x_BLD.device.type != "cpu":
        rows = end - start
    else:
        rows = max(1, _CPU_BLOCK_ELEMENTS // max(1, x_BLD.size(0) * x_BLD.size(-1)))
    for first in range(start, end, max(1, rows)):
        yield slice(first, min(end, first + rows))


def _segments(num_rows: int, num_history: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((s, a, b) for s, a, b in ((0, 0, num_history), (1, num_history, num_rows)) if b > a)


def gated_residual_(x_BLD: Tensor, update_BLD: Tensor, gate_SD: Tensor | None, *, num_history: int) -> None:
    """x += update * gate in place, in float32, rounded once; the first num_history rows take gate row 0.

    Without a gate: x += update.
    """
    if gate_SD is None:
        x_BLD.add_(update_BLD)
        return
    for segment, start, end in _segments(x_BLD.size(1), num_history):
        gate_D = gate_SD[segment]
        for rows in _row_blocks(x_BLD, start, end):
            x_BLD[:, rows] = torch.addcmul(x_BLD[:, rows].float(), update_BLD[:, rows].float(), gate_D)


def norm_scale_shift(
    x_BLD: Tensor,
    weight_SD: Tensor,
    bias_SD: Tensor,
    *,
    num_history: int,
    eps: float,
    out: Tensor | EightBitRows | None = None,
) -> Tensor | EightBitRows:
    """LayerNorm over D in float32, times weight plus bias; the first num_history rows take row 0 of both.

    weight and bias are float32 rows: 1 + scale and shift of AdaLN, or an affine norm's own parameters. An out of
    EightBitRows takes the rounded result as quantize_rows has it.
    """
    if isinstance(out, EightBitRows):
        rows = quantize_rows(norm_scale_shift(x_BLD, weight_SD, bias_SD, num_history=num_history, eps=eps))
        out.values.copy_(rows.values)
        out.scale.copy_(rows.scale)
        return out
    if out is None:
        out = torch.empty_like(x_BLD)
    width = (x_BLD.size(-1),)
    for segment, start, end in _segments(x_BLD.size(1), num_history):
        for rows in _row_blocks(x_BLD, start, end):
            out[:, rows] = F.layer_norm(x_BLD[:, rows].float(), width, weight_SD[segment], bias_SD[segment], eps)
    return out


def rms_norm_(x_BLD: Tensor, weight_D: Tensor, *, eps: float) -> None:
    """RMSNorm over the whole width in place: float32 inside, rounded once. Rows may be strided."""
    for rows in _row_blocks(x_BLD, 0, x_BLD.size(1)):
        x_BLD[:, rows] = _rms_norm(x_BLD[:, rows], weight_D, eps)


def residual_gate_norm_(
    x_BLD: Tensor,
    update_BLD: Tensor,
    gate_SD: Tensor | None,
    weight_SD: Tensor,
    bias_SD: Tensor,
    *,
    num_history: int,
    eps: float,
    out: Tensor | EightBitRows | None = None,
) -> Tensor | EightBitRows:
    """gated_residual_, then norm_scale_shift of the result."""
    gated_residual_(x_BLD, update_BLD, gate_SD, num_history=num_history)
    return norm_scale_shift(x_BLD, weight_SD, bias_SD, num_history=num_history, eps=eps, out=out)


def quantize_rows(x_BLD: Tensor, *, gelu: bool = False) -> EightBitRows:
    """Rows in e4m3, each row's largest magnitude put at e4m3's largest number, 448; of tanh-GELU of x where that is wanted.

    Rounded once, to nearest, GELU to x's dtype before; a row with a NaN becomes NaN.
    """
    wide = (F.gelu(x_BLD, approximate="tanh") if gelu else x_BLD).float()
    top = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    largest = torch.full_like(
        top, 448.0
    )  # with a plain number torch takes reciprocals, and products of them round twice
    return EightBitRows((wide * (largest / top)).to(torch.float8_e4m3fn), top / largest)


def quantize_heads(
    q_BLHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """((q, k, v in e4m3), (what to multiply each by, [B, H] float32)): a head's largest magnitude lies at 448.

    Rounded once, to nearest; a head with a NaN becomes NaN.
    """
    values, scales = [], []
    for x in (q_BLHK, k_BMHK, v_BMHK):
        top_BH = x.float().abs().amax(dim=(1, 3)) if x.size(1) else x.new_zeros(x.size(0), x.size(2)).float()
        top_BH = top_BH.clamp_min(1e-12)
        largest = torch.full_like(top_BH, 448.0)
        values.append((x.float() * (largest / top_BH)[:, None, :, None]).to(torch.float8_e4m3fn))
        scales.append(top_BH / largest)
    return tuple(values), tuple(scales)


def qk_rms_norm_rope_(
    qkv_BLE: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    rotation_LK2: Tensor,
    *,
    eps: float,
    history_scale_H: Tensor | None = None,
    num_history: int = 0,
    first_query: int = 0,
) -> None:
    """RMSNorm over the whole width, then rotary embedding per head, of q and k in qkv [B, L, 3 D], in place.

    rotation [L, K/2, 2] holds cosine and sine and turns the pairs (2i, 2i + 1) of every head. history_scale [H]
    multiplies the first num_history rows' keys afterwards (amplified history keys). Queries of rows before first_query
    are left as they are. Rounded after the norm, after the rotation and after the scaling, as the reference does.
    """
    q, k, _ = qkv_BLE.chunk(3, dim=-1)
    _norm_and_turn_(q[:, first_query:], q_weight_D, rotation_LK2[first_query:], eps)
    _norm_and_turn_(k, k_weight_D, rotation_LK2, eps)
    if history_scale_H is not None and num_history:
        heads = k[:, :num_history].unflatten(-1, (history_scale_H.numel(), -1))
        heads.copy_(heads.float() * history_scale_H[:, None])


def _norm_and_turn_(x_BLD: Tensor, weight_D: Tensor, rotation_LK2: Tensor, eps: float) -> None:
    half = rotation_LK2.size(1)
    rotation = torch.view_as_complex(rotation_LK2)
    for rows in _row_blocks(x_BLD, 0, x_BLD.size(1)):
        normed = _rms_norm(x_BLD[:, rows], weight_D, eps).to(x_BLD.dtype)
        pairs = torch.view_as_complex(normed.float().unflatten(-1, (-1, half, 2)))
        x_BLD[:, rows] = torch.view_as_real(pairs * rotation[rows, None]).flatten(-3)


def qk_rms_norm_rope_pack(
    qkv_BLE: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    rotation_LK2: Tensor,
    heads: Sequence[int],
    *,
    eps: float,
    history_scale_H: Tensor | None = None,
    num_history: int = 0,
    first_query: int = 0,
) -> Tensor:
    """What qk_rms_norm_rope_ makes of qkv, as the flat send buffer of a head exchange; qkv itself stays or changes.

    Destination by destination, [L][B][3][heads of it][K]. Queries of rows before first_query are not set.
    """
    qk_rms_norm_rope_(
        *(qkv_BLE, q_weight_D, k_weight_D, rotation_LK2),
        eps=eps,
        history_scale_H=history_scale_H,
        num_history=num_history,
        first_query=first_query,
    )
    token_first = qkv_BLE.unflatten(-1, (3, sum(heads), -1)).transpose(0, 1)
    return torch.cat([part.reshape(-1) for part in token_first.split(list(heads), dim=3)])


def unpack_heads(received: Tensor, shape: tuple[int, int, int, int], heads: Sequence[int]) -> Tensor:
    """[B, L, H, K] from a flat buffer that holds, source by source, [L][B][heads of it][K]."""
    batch, rows, _, head_dim = shape
    parts = received.split([rows * batch * count * head_dim for count in heads])
    parts = [part.view(rows, batch, count, head_dim) for part, count in zip(parts, heads, strict=True)]
    return torch.cat(parts, dim=2).transpose(0, 1)


def _rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_BLD.float()
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return x * inverse_rms * weight_D.float()


def gelu_(x: Tensor) -> Tensor:
    """tanh-GELU in place."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


def linear_gelu(x_BLD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of x weight^T + bias, [B, L, D] -> [B, L, F]."""
    return gelu_(F.linear(x_BLD, weight, bias))


def merge_partials_(out_BLHK: Tensor, lse_BLH: Tensor, other_BLHK: Tensor, other_lse_BLH: Tensor) -> None:
    """Fold a second attention partial, over other keys, into the first, in place; out and both lse are float32.

    lse is the natural log of the sum of exponentials; a row with -inf saw no key and contributes nothing.
    Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.
    """
    top = torch.maximum(lse_BLH, other_lse_BLH)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    own, other = (lse_BLH - top).exp(), (other_lse_BLH - top).exp()
    total = own + other
    safe = torch.where(total == 0, torch.ones_like(total), total)
    out_BLHK.mul_((own / safe).unsqueeze(-1)).add_(other_BLHK.float() * (other / safe).unsqueeze(-1))
    lse_BLH.copy_(top + total.log())


def patch_rows(
    latents_BCTHW: Tensor,
    kernel: tuple[int, int, int],
    *,
    dtype: torch.dtype | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Non-overlapping patches as rows [B, tokens, C * t * h * w], tokens in (t, h, w) order; some of the rows, in dtype.

    A latent whose size is no multiple of the kernel is continued by repeating its last frame, row or column.
    """
    latents_BCTHW = latents_BCTHW if dtype is None else latents_BCTHW.to(dtype)
    batch, channels = latents_BCTHW.shape[:2]
    t, h, w = kernel
    pad = [(-size) % k for size, k in zip(latents_BCTHW.shape[2:], kernel, strict=True)]
    if any(pad):
        latents_BCTHW = F.pad(latents_BCTHW, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
    grid = [size // k for size, k in zip(latents_BCTHW.shape[2:], kernel, strict=True)]
    patches = latents_BCTHW.reshape(batch, channels, grid[0], t, grid[1], h, grid[2], w)
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], -1)
    return patches[:, rows]


def unpatchify(rows_BND: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Output rows [B, tokens, pt * ph * pw * C], channel fastest, back to latents [B, C, T, H, W] (contiguous)."""
    batch = rows_BND.size(0)
    (frames, rows, columns), (t, h, w) = grid, patch
    blocks = rows_BND.view(batch, frames, rows, columns, t, h, w, -1)
    return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames * t, rows * h, columns * w)


def _velocity(rows_BND: Tensor, latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Output rows in the latents' layout."""
    grid = tuple(size // part for size, part in zip(latents.shape[2:], patch, strict=True))
    return unpatchify(rows_BND, grid, patch)


def euler_step_(
    latents: Tensor, rows_BND: Tensor, coefficients_S1: Tensor, index: Tensor, patch: tuple[int, int, int]
) -> None:
    """latents += delta * velocity in float32; the velocity comes as output rows, see unpatchify.

    A row of coefficients, float64, holds (delta,); index, int64 [1], is the step to take.
    """
    (delta,) = coefficients_S1.index_select(0, index)[0].float()
    latents.copy_(latents.float() + delta * _velocity(rows_BND, latents, patch).float())


def dmd_step_(
    latents: Tensor,
    rows_BND: Tensor,
    start: Tensor,
    coefficients_S2: Tensor,
    index: Tensor,
    patch: tuple[int, int, int],
) -> None:
    """x0 = latents - sigma * velocity in the velocity's dtype; latents become x0 where sigma_next is 0, else
    (1 - sigma_next) * x0 + sigma_next * start.

    A row of coefficients holds (sigma, sigma_next). Computed in float64 and rounded, as the reference does.
    """
    sigma, sigma_next = coefficients_S2.index_select(0, index)[0]
    velocity = _velocity(rows_BND, latents, patch)
    x0 = (latents.double() - sigma * velocity.double()).to(velocity.dtype)
    latents.copy_((1 - sigma_next) * x0.double() + sigma_next * start.double())


def unipc_step_(
    latents: Tensor,
    rows_BND: Tensor,
    history_KBCTHW: Tensor,
    base: Tensor,
    coefficients: Tensor,
    index: Tensor,
    patch: tuple[int, int, int],
) -> None:
    """One multistep update in float32. history [K, ...] holds the x0 of step s in place s % K, base what a step starts from.

    x0 = latents - sigma * velocity. base becomes latents, or where the step corrects the combination correct of
    (base, x0, *older), older being the x0 of the steps before, newest first. latents become the combination predict of
    (base, x0, *older). A row of coefficients, float64, holds (sigma, corrects as 0 or 1, *correct, *predict).
    """
    kept = history_KBCTHW.size(0)
    sigma, corrects, *combinations = coefficients.index_select(0, index)[0].float()
    correct, predict = combinations[: 2 + kept], combinations[2 + kept :]
    x0 = latents.float() - sigma * _velocity(rows_BND, latents, patch).float()
    newest_first = torch.arange(kept - 1, -1, -1, device=index.device)
    older = history_KBCTHW.index_select(0, (index + newest_first) % kept).unbind(0)
    corrected = base * correct[0]
    for scale, tensor in zip(correct[2:], older, strict=True):
        corrected = corrected + tensor * scale
    base.copy_(torch.where(corrects != 0, corrected + x0 * correct[1], latents.float()))
    following = base * predict[0]
    for scale, tensor in zip(predict[1:], (x0, *older), strict=True):
        following = following + tensor * scale
    history_KBCTHW.index_copy_(0, index % kept, x0[None])
    latents.copy_(following)


def upsample_renoise(
    x_BCTHW: Tensor, draws_N4: Tensor, factor: Tensor, *, alpha: float, beta: float, dtype: torch.dtype
) -> Tensor:
    """alpha * (x at twice the rows and columns, by repetition) + beta * block noise.

    The noise of each 2 x 2 block is factor [4, 4] times its draws [4], rounded to dtype; blocks in (B, C, T, H, W) order.
    """
    batch, channels, frames, height, width = x_BCTHW.shape
    blocks = (draws_N4 @ factor.T).view(batch, channels, frames, height, width, 2, 2)
    noise = blocks.transpose(4, 5).reshape(batch, channels, frames, 2 * height, 2 * width).to(dtype)
    enlarged = x_BCTHW.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    return alpha * enlarged + beta * noise


def cfg_combine(positive: Tensor, negative: Tensor, *, scale: float, zero_star: bool) -> Tensor:
    """negative + scale * (positive - negative); with zero_star negative is first projected onto positive, per sample.

    The projection is <positive, negative> / (|negative|^2 + 1e-8). Source: arXiv 2207.12598, arXiv 2503.18886.
    """
    if zero_star:
        flat = positive.float().flatten(1), negative.float().flatten(1)
        factor = (flat[0] * flat[1]).sum(dim=1) / (flat[1].square().sum(dim=1) + 1e-8)
        negative = negative * factor.to(negative.dtype).view(-1, *[1] * (negative.ndim - 1))
    return negative + scale * (positive - negative)


def channel_norm_silu(
    x_BCTHW: Tensor,
    gamma: Tensor,
    *,
    silu: bool = True,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x over its norm along channels, times sqrt(C) * gamma, through SiLU; 16-bit numbers are rounded after each product.

    x is x + (bias + residual) first, rounded once, and with a residual that sum is also what x holds afterwards.
    """
    if residual is not None:
        bias_residual(x_BCTHW, bias, residual)
    elif bias is not None:
        x_BCTHW = _sum_of(x_BCTHW, bias, None)
    gamma = gamma.reshape(-1, 1, 1, 1)
    wide, scale = x_BCTHW.float(), x_BCTHW.size(1) ** 0.5
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(1e-12)
    if x_BCTHW.dtype == torch.float32:
        result = (x_BCTHW / norm).mul_(gamma * scale)
    else:
        result = (wide / norm).to(x_BCTHW.dtype) * scale * gamma
    result = F.silu(result, inplace=True) if silu else result
    return result if out is None else out.copy_(result)


def upsample_nearest(
    x_BCTHW: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x + (bias + residual), rounded once, at twice the rows and columns, by repetition."""
    if bias is not None or residual is not None:
        x_BCTHW = _sum_of(x_BCTHW, bias, residual)
    batch = x_BCTHW.size(0)
    frames = F.interpolate(x_BCTHW.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
    result = frames.unflatten(0, (batch, -1)).transpose(1, 2)
    return result if out is None else out.copy_(result)


def bias_residual(
    x_BCTHW: Tensor, bias: Tensor | None, residual: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """x + (bias per channel + residual), the sum of all rounded once, into out or in place."""
    return (x_BCTHW if out is None else out).copy_(_sum_of(x_BCTHW, bias, residual))


def _sum_of(x_BCTHW: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    added = 0.0 if bias is None else bias.float().view(-1, 1, 1, 1)
    if residual is not None:
        added = added + residual.float()
    return (x_BCTHW.float() + added).to(x_BCTHW.dtype)
