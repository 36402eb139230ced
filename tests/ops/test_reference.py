"""Each operator against its formula in float64, in every dtype, with segments, strides and row blocks that do not divide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.ops import reference as ops

EPS = 1e-6
# One rounding to bfloat16 is 2^-9 relative; two roundings where the definition has two. float32 sums of 64 to 384 terms.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = list(RELATIVE)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs()
    assert bool((error <= factor * RELATIVE[dtype] * expected.abs().clamp_min(1.0)).all()), error.max()


@pytest.fixture(params=[1, 700, 10**9], ids=["one-row-blocks", "few-row-blocks", "one-block"])
def _block_size(request, monkeypatch):
    monkeypatch.setattr(ops, "_CPU_BLOCK_ELEMENTS", request.param)


def _rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_history", [0, 1, 12, 13])
def test_gated_residual(dtype: torch.dtype, num_history: int) -> None:
    x, update, gate = _rand(2, 13, 96, dtype=dtype), _rand(2, 13, 96, dtype=dtype, seed=1), _rand(2, 96)
    rows = (torch.arange(13) >= num_history).long()
    expected = x.double() + update.double() * gate.double()[rows]
    ops.gated_residual_(x, update, gate, num_history=num_history)
    _close(x, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_without_gate(dtype: torch.dtype) -> None:
    x, update = _rand(1, 5, 32, dtype=dtype), _rand(1, 5, 32, dtype=dtype, seed=1)
    expected = x.double() + update.double()
    ops.gated_residual_(x, update, None, num_history=0)
    _close(x, expected, dtype)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_history", [0, 1, 12, 13])
def test_norm_scale_shift(dtype: torch.dtype, num_history: int) -> None:
    x, weight, bias = _rand(2, 13, 384, dtype=dtype) * 3 + 1, _rand(2, 384), _rand(2, 384, seed=1)
    rows = (torch.arange(13) >= num_history).long()
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    expected = normed * weight.double()[rows] + bias.double()[rows]
    out = ops.norm_scale_shift(x, weight, bias, num_history=num_history, eps=EPS)
    _close(out, expected, dtype, factor=4)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_in_strided_rows(dtype: torch.dtype) -> None:
    fused, weight = _rand(2, 7, 3 * 64, dtype=dtype), _rand(64, dtype=dtype)
    before = fused.clone()
    view = fused.chunk(3, dim=-1)[1]
    expected = _rms(view, weight)
    ops.rms_norm_(view, weight, eps=EPS)
    _close(view, expected, dtype)
    assert torch.equal(fused[..., :64], before[..., :64])
    assert torch.equal(fused[..., 128:], before[..., 128:])


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_history", [0, 1, 6, 7])
@pytest.mark.parametrize("scaled", [False, True])
def test_rms_norm_rope(dtype: torch.dtype, num_history: int, scaled: bool) -> None:
    heads, head_dim, tokens = 3, 16, 7
    x, weight = _rand(2, tokens, heads * head_dim, dtype=dtype), _rand(heads * head_dim, dtype=dtype)
    angles = _rand(tokens, head_dim // 2)
    scale = 1 + _rand(heads).abs() if scaled else None
    even, odd = _rms(x, weight).unflatten(-1, (heads, head_dim // 2, 2)).unbind(-1)
    cos, sin = angles.double().cos()[None, :, None], angles.double().sin()[None, :, None]
    expected = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    if scaled:
        expected[:, :num_history] *= scale.double()[:, None, None]
    qkv, rotation = torch.cat([x, x, x], dim=-1), torch.stack([angles.cos(), angles.sin()], dim=-1)
    ops.qk_rms_norm_rope_(qkv, weight, weight, rotation, eps=EPS, history_scale_H=scale, num_history=num_history)
    _close(qkv.chunk(3, dim=-1)[1], expected.flatten(-3), dtype, factor=6)
    assert torch.equal(qkv.chunk(3, dim=-1)[2], x), "values stay"


def test_rope_keeps_lengths_and_relative_angles() -> None:
    x = _rand(1, 4, 32).expand(1, 4, 32).clone()
    x[:] = x[:, :1]
    angles = torch.arange(4.0)[:, None] * torch.linspace(0.1, 1, 8)
    qkv, rotation = torch.cat([x, x, x], dim=-1), torch.stack([angles.cos(), angles.sin()], dim=-1)
    ops.qk_rms_norm_rope_(qkv, torch.ones(32), torch.ones(32), rotation, eps=0.0)
    x = qkv[..., :32]
    heads = x.unflatten(-1, (2, 16))
    torch.testing.assert_close(heads.norm(dim=-1), heads.norm(dim=-1)[:, :1].expand(1, 4, 2), rtol=1e-5, atol=1e-5)
    dots = (heads[:, 1:] * heads[:, :-1]).sum(-1)
    torch.testing.assert_close(dots, dots[:, :1].expand_as(dots), rtol=1e-5, atol=1e-5)


def test_gelu_is_the_tanh_form() -> None:
    x = _rand(3, 50) * 3
    expected = F.gelu(x, approximate="tanh")
    assert torch.equal(ops.gelu_(x), expected)
    assert (expected - F.gelu(x)).abs().max() > 1e-5 or x.numel() < 2


@pytest.mark.parametrize("kernel", [(1, 2, 2), (2, 4, 4), (4, 8, 8)])
@pytest.mark.parametrize("size", [(4, 8, 8), (9, 12, 20), (2, 6, 10), (1, 1, 3)])
def test_patch_rows_times_weight_is_the_convolution(kernel, size) -> None:
    latents, weight = _rand(2, 3, *size), _rand(5, 3, *kernel)
    pad = [(-s) % k for s, k in zip(size, kernel, strict=True)]
    padded = F.pad(latents, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
    expected = F.conv3d(padded, weight, stride=kernel).flatten(2).transpose(1, 2)
    actual = ops.patch_rows(latents, kernel) @ weight.flatten(1).T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_unpatchify_undoes_patches() -> None:
    latents = _rand(2, 4, 9, 6, 10)
    rows = ops.patch_rows(latents, (1, 2, 2)).unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)
    back = ops.unpatchify(rows, (9, 3, 5), (1, 2, 2))
    assert torch.equal(back, latents)
    assert back.is_contiguous()
