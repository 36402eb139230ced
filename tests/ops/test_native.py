"""The compiled operators against float64 and against plain torch: rounding points, shapes, strides, poison, fakes.

The same file runs on a GPU, where there is one: every test takes each device whose kernels this build has.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.ops import native, reference

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not (native._ON_GPU and torch.cuda.is_available()), reason="no CUDA kernels or no GPU"),
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A result's relative error when float32 sums are exact but for their order, or one rounding to 16 bits; two where stated.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}
EPS = 1e-6
POISON = float("nan")

each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rand(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def near(actual: Tensor, exact: Tensor, dtype: torch.dtype, *, roundings: int = 1) -> None:
    """Relative L2 error within so many roundings of the float64 result."""
    exact = exact.double()
    error = (actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error <= roundings * RELATIVE[dtype], f"{error:.2e}"


def same_but_for_ties(actual: Tensor, expected: Tensor) -> None:
    """Equal to plain torch's chain, but for elements that lie on a rounding boundary.

    float16 keeps three bits more than bfloat16, so the last bits of a float32 sum decide eight times as often. A few ties
    are no share of a few hundred elements, so two are always allowed.
    """
    share = {torch.float32: 1.0, torch.bfloat16: 1e-3, torch.float16: 1e-2}[actual.dtype]
    different = int((actual != expected).sum())
    assert different <= max(2, share * actual.numel()), f"{different} of {actual.numel()}"
    torch.testing.assert_close(
        actual,
        expected,
        rtol=1.6e-2 if actual.dtype != torch.float32 else 1e-5,
        atol=2e-3 if actual.dtype != torch.float32 else 1e-5,
    )


def guarded(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """(a poisoned tensor, the buffer around it): what lies around must stay NaN."""
    count = 1
    for size in shape:
        count *= size
    buffer = torch.full((count + 128,), POISON, dtype=dtype, device=device)
    return buffer[64 : 64 + count].view(shape), buffer


def assert_margins_untouched(buffer: Tensor) -> None:
    assert buffer[:64].isnan().all()
    assert buffer[-64:].isnan().all()


# Widths: vectors of every dtype, the 14 B model's, and odd ones.
WIDTHS = [5120, 96, 33, 1]


@each_device
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_history", [0, 1, 4, 5])
def test_residual_gate_norm(device, dtype, width: int, num_history: int) -> None:
    x, y = rand(2, 5, width, dtype=dtype, device=device), rand(2, 5, width, dtype=dtype, device=device, seed=1)
    gate, weight, bias = (rand(2, width, device=device, seed=seed) for seed in (2, 3, 4))
    segment = (torch.arange(5, device=device) >= num_history).long()
    summed = x.double() + y.double() * gate.double()[segment]
    expected, expected_x = x.clone(), x.clone()
    out, buffer = guarded(2, 5, width, dtype=dtype, device=device)
    settings = {"num_history": num_history, "eps": EPS}
    expected = reference.residual_gate_norm_(expected_x, y, gate, weight, bias, **settings)
    native.residual_gate_norm_(x, y, gate, weight, bias, out=out, **settings)
    assert_margins_untouched(buffer)
    near(x, summed, dtype)
    same_but_for_ties(x, expected_x)
    if width > 1:
        mean, var = x.double().mean(-1, keepdim=True), x.double().var(-1, correction=0, keepdim=True)
        exact = (x.double() - mean) / (var + EPS).sqrt() * weight.double()[segment] + bias.double()[segment]
        near(out, exact, dtype)
        same_but_for_ties(out, expected)


@each_device
@each_dtype
def test_parts_of_the_residual_norm(device, dtype) -> None:
    x, y = rand(1, 6, 64, dtype=dtype, device=device), rand(1, 6, 64, dtype=dtype, device=device, seed=1)
    weight, bias = torch.ones(2, 64, device=device), torch.zeros(2, 64, device=device)
    plain = native.norm_scale_shift(x, weight, bias, num_history=3, eps=EPS)
    near(plain, F.layer_norm(x.double(), (64,), eps=EPS), dtype)
    untouched = x.clone()
    native.gated_residual_(x, y, torch.zeros(2, 64, device=device), num_history=2)
    assert torch.equal(x, untouched), "a closed gate changes nothing"
    native.gated_residual_(x, y, None, num_history=0)
    assert torch.equal(x, untouched + y)
    one_row = rand(64, device=device).expand(2, 64)
    expected = reference.norm_scale_shift(x, one_row, one_row, num_history=2, eps=EPS)
    same_but_for_ties(native.norm_scale_shift(x, one_row, one_row, num_history=2, eps=EPS), expected)


@each_device
@each_dtype
def test_segments_do_not_leak(device, dtype) -> None:
    x, y = rand(1, 4, 64, dtype=dtype, device=device), rand(1, 4, 64, dtype=dtype, device=device, seed=1)
    x[:, 2] = POISON
    gate = torch.stack([rand(64, device=device), torch.full((64,), POISON, device=device)])
    ones = torch.ones(2, 64, device=device)
    out = native.residual_gate_norm_(x, y, gate, ones, ones, num_history=2, eps=EPS)
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


@each_device
@each_dtype
def test_rows_may_be_strided_and_parts_of_a_sequence(device, dtype) -> None:
    """Cut and whole are bitwise the same, so sharded rows are."""
    buffer = rand(2, 9, 3 * 160, dtype=dtype, device=device)
    x = buffer[:, 1:8, 160:320]
    weight, bias = rand(2, 160, device=device), rand(2, 160, device=device, seed=1)
    whole = native.norm_scale_shift(x, weight, bias, num_history=3, eps=EPS)
    first = native.norm_scale_shift(x[:, :4], weight, bias, num_history=3, eps=EPS)
    second = native.norm_scale_shift(x[:, 4:].contiguous(), weight, bias, num_history=0, eps=EPS)
    assert torch.equal(whole, torch.cat([first, second], dim=1))
    norm = rand(160, dtype=dtype, device=device)
    apart, before = x.contiguous(), buffer.clone()
    native.rms_norm_(x, norm, eps=EPS)
    native.rms_norm_(apart, norm, eps=EPS)
    assert torch.equal(x, apart)
    assert torch.equal(buffer[..., :160], before[..., :160])
    assert torch.equal(buffer[:, 0], before[:, 0])


def _qkv_case(dtype: torch.dtype, device: str, heads: int, head_dim: int, batch: int = 2, rows: int = 7):
    width = heads * head_dim
    qkv = rand(batch, rows, 3 * width, dtype=dtype, device=device)
    weights = [rand(width, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
    angles = rand(rows, head_dim // 2, device=device, seed=3)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return qkv, weights, rotation, 1 + rand(heads, device=device, seed=4).abs()


HEADS = [(3, 16), (40, 128), (2, 10), (1, 600), (5, 2)]


@each_device
@each_dtype
@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
@pytest.mark.parametrize(("num_history", "first_query"), [(0, 0), (3, 3), (7, 0), (3, 7)])
def test_qk_rmsnorm_rope(device, dtype, heads: int, head_dim: int, num_history: int, first_query: int) -> None:
    qkv, weights, rotation, scale = _qkv_case(dtype, device, heads, head_dim)
    before, expected = qkv.clone(), qkv.clone()
    settings = {"eps": EPS, "history_scale_H": scale, "num_history": num_history, "first_query": first_query}
    reference.qk_rms_norm_rope_(expected, *weights, rotation, **settings)
    native.qk_rms_norm_rope_(qkv, *weights, rotation, **settings)
    width = heads * head_dim
    assert torch.equal(qkv[..., 2 * width :], before[..., 2 * width :])
    assert torch.equal(qkv[:, :first_query, :width], before[:, :first_query, :width])
    same_but_for_ties(qkv, expected)
    k = before[..., width : 2 * width].double()
    normed = k * (k.square().mean(-1, keepdim=True) + EPS).rsqrt() * weights[1].double()
    even, odd = normed.unflatten(-1, (heads, head_dim // 2, 2)).unbind(-1)
    cos, sin = rotation.double()[:, None].unbind(-1)
    exact = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    exact[:, :num_history] *= scale.double()[:, None, None]
    near(qkv[..., width : 2 * width], exact.flatten(-3), dtype, roundings=2)


@each_device
@each_dtype
@pytest.mark.parametrize("split", [(2, 1), (3,), (1, 1, 1), (0, 3, 0), (2, 0, 1)], ids=str)
def test_the_packed_variant_moves_the_same_numbers(device, dtype, split: tuple[int, ...]) -> None:
    qkv, weights, rotation, scale = _qkv_case(dtype, device, 3, 16)
    settings = {"eps": EPS, "history_scale_H": scale, "num_history": 3}
    packed = native.qk_rms_norm_rope_pack(qkv, *weights, rotation, split, **settings)
    native.qk_rms_norm_rope_(qkv, *weights, rotation, **settings)
    token_first = qkv.unflatten(-1, (3, 3, 16)).transpose(0, 1)
    expected = torch.cat([part.reshape(-1) for part in token_first.split(list(split), dim=3)])
    assert torch.equal(packed, expected)


@each_device
@pytest.mark.parametrize("rows", [13, 40])
def test_packing_wide_rows_that_are_no_real_width(device, rows: int) -> None:
    """Warps of a block that has done a value's row, without a sum, go on to a query's while others still sum a key's."""
    qkv, weights, rotation, scale = _qkv_case(torch.float32, device, 8, 64, rows=rows)
    settings = {"eps": EPS, "history_scale_H": scale, "num_history": 3}
    expected = qkv.clone()
    packed = native.qk_rms_norm_rope_pack(qkv, *weights, rotation, (8,), **settings).view(rows, 2, 3, 512)
    reference.qk_rms_norm_rope_(expected, *weights, rotation, **settings)
    torch.testing.assert_close(packed.transpose(0, 1).flatten(2), expected, rtol=1e-5, atol=1e-5)


@each_device
def test_packing_leaves_unread_queries_unset(device) -> None:
    qkv, weights, rotation, _ = _qkv_case(torch.float32, device, 3, 16)
    packed = torch.full((qkv.numel(),), POISON, device=device)
    torch.ops.helios.qk_rmsnorm_rope_pack(qkv, *weights, rotation, None, packed, [3], 0, 4, EPS)
    rows = packed.view(7, 2, 3, 48)
    assert rows[:4, :, 0].isnan().all()
    assert rows[4:, :, 0].isfinite().all()
    assert rows[:, :, 1:].isfinite().all()


@each_device
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_rmsnorm_rows(device, dtype, width: int) -> None:
    x, weight = rand(2, 3, width, dtype=dtype, device=device), rand(width, dtype=dtype, device=device, seed=1)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    expected = x.clone()
    reference.rms_norm_(expected, weight, eps=EPS)
    native.rms_norm_(x, weight, eps=EPS)
    near(x, exact, dtype)
    same_but_for_ties(x, expected)


@each_device
@each_dtype
@pytest.mark.parametrize("split", [(4,), (1, 3), (2, 0, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 3])
def test_unpack_heads(device, dtype, split: tuple[int, ...], head_dim: int) -> None:
    whole = rand(2, 5, 4, head_dim, dtype=dtype, device=device)
    received = torch.cat([part.transpose(0, 1).reshape(-1) for part in whole.split(list(split), dim=2)])
    assert torch.equal(native.unpack_heads(received, (2, 5, 4, head_dim), split), whole)


@each_device
@each_dtype
def test_merge_partials(device, dtype) -> None:
    out, other = rand(2, 5, 3, 8, device=device), rand(2, 5, 3, 8, dtype=dtype, device=device, seed=1)
    lse, other_lse = rand(2, 5, 3, device=device, seed=2), 3 * rand(2, 5, 3, device=device, seed=3)
    lse[0, 0], other_lse[0, 1], lse[0, 2], other_lse[0, 2] = (float("-inf"),) * 4
    out[0, 0], out[0, 2] = 0, 0
    expected, expected_lse = out.clone(), lse.clone()
    reference.merge_partials_(expected, expected_lse, other, other_lse)
    untouched = out[0, 1].clone()
    out[0, 0] = POISON  # it saw no key, so whatever it holds counts for nothing
    native.merge_partials_(out, lse, other, other_lse)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[0, 1], untouched)
    assert torch.equal(out[0, 2], torch.zeros_like(out[0, 2]))


KERNELS = [(1, 2, 2), (2, 4, 4), (4, 8, 8), (1, 1, 1), (3, 2, 5)]


@each_device
@pytest.mark.parametrize(("source", "target"), itertools.product(DTYPES, DTYPES), ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_patch_rows_are_bit_equal(device, source, target, kernel) -> None:
    latents = rand(2, 4, 5, 6, 9, dtype=source, device=device)
    expected = reference.patch_rows(latents, kernel, dtype=target)
    assert torch.equal(native.patch_rows(latents, kernel, dtype=target), expected)
    some = slice(1, max(1, expected.size(1) - 1))
    assert torch.equal(native.patch_rows(latents, kernel, dtype=target, rows=some), expected[:, some])
    moved = latents.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(native.patch_rows(moved, kernel, dtype=target), expected)


def _step_case(dtype: torch.dtype, wide: bool, device: str):
    latents = rand(2, 4, 3, 4, 6, dtype=torch.float32 if wide else dtype, device=device)
    rows = rand(2, 3 * 2 * 3, 4 * 4, dtype=dtype, device=device, seed=1)
    return latents, rows, (1, 2, 2)


@each_device
@each_dtype
@pytest.mark.parametrize("wide", [True, False])
def test_euler_and_distilled_steps(device, dtype, wide: bool) -> None:
    latents, rows, patch = _step_case(dtype, wide, device)
    index = torch.tensor([1], device=device)
    deltas = torch.tensor([[9.0], [-0.3]], dtype=torch.float64, device=device)
    ours, expected = latents.clone(), latents.clone()
    native.euler_step_(ours, rows, deltas, index, patch)
    reference.euler_step_(expected, rows, deltas, index, patch)
    torch.testing.assert_close(ours, expected)
    start = rand(*latents.shape, dtype=latents.dtype, device=device, seed=5)
    for sigma_next in (0.33, 0.0):
        sigmas = torch.tensor([[9.0, 9.0], [0.71, sigma_next]], dtype=torch.float64, device=device)
        ours, expected = latents.clone(), latents.clone()
        native.dmd_step_(ours, rows, start, sigmas, index, patch)
        reference.dmd_step_(expected, rows, start, sigmas, index, patch)
        assert torch.equal(ours, expected), "defined in float64, so bit for bit"
    assert torch.equal(ours, ours.to(dtype).to(ours.dtype)), "the last step ends on x0, which has the velocity's dtype"


@each_device
@each_dtype
@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("corrects", [True, False])
def test_unipc_step(device, dtype, index: int, kept: int, corrects: bool) -> None:
    latents, rows, patch = _step_case(dtype, True, device)
    history = rand(kept, *latents.shape, device=device, seed=2)
    base = rand(*latents.shape, device=device, seed=9)
    row = [0.6, float(corrects), *[0.9, -0.4, 0.7, 0.2, -1.1][: 2 + kept], *[-1.1, 0.2, 0.8, 0.3, 0.9][: 2 + kept]]
    table = torch.full((6, 6 + 2 * kept), float("nan"), dtype=torch.float64)
    table[index] = torch.tensor(row)
    states = []
    for ops in (native, reference):
        state = [latents.clone(), history.clone(), base.clone()]
        numbers = (table.to(device), torch.tensor([index], device=device))
        ops.unipc_step_(state[0], rows, *state[1:], *numbers, patch)
        states.append(state)
    for ours, expected in zip(*states, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # And by the definition, in float64.
    velocity = reference.unpatchify(rows.double(), (3, 2, 3), patch)
    x0 = latents.double() - 0.6 * velocity
    older = [history[(index - 1 - k) % kept].double() for k in range(kept)]
    start = base * row[2] + x0 * row[3] + sum(row[4 + k] * x for k, x in enumerate(older))
    start = start if corrects else latents.double()
    predict = row[4 + kept :]
    expected = start * predict[0] + x0 * predict[1] + sum(predict[2 + k] * x for k, x in enumerate(older))
    torch.testing.assert_close(states[0][0].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(states[0][1][index % kept], states[1][1][index % kept])


@each_device
@pytest.mark.parametrize(
    ("x_dtype", "dtype"), [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2], ids=str
)
def test_upsample_renoise(device, x_dtype, dtype) -> None:
    x, draws = rand(2, 3, 2, 3, 5, dtype=x_dtype, device=device), rand(2 * 3 * 2 * 3 * 5, 4, device=device)
    factor = rand(4, 4, device=device).tril()
    settings = {"alpha": 0.6, "beta": 0.69, "dtype": dtype}
    ours, expected = (ops.upsample_renoise(x, draws, factor, **settings) for ops in (native, reference))
    assert ours.dtype == expected.dtype
    same_but_for_ties(ours, expected)


@each_device
@each_dtype
@pytest.mark.parametrize("zero_star", [True, False])
def test_cfg_combine(device, dtype, zero_star: bool) -> None:
    positive, negative = (rand(3, 50, 64, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    settings = {"scale": 4.5, "zero_star": zero_star}
    ours = native.cfg_combine(positive, negative, **settings)
    same_but_for_ties(ours, reference.cfg_combine(positive, negative, **settings))
    assert torch.equal(ours, native.cfg_combine(positive, negative, **settings)), "sums have one order"
    if zero_star:
        near(native.cfg_combine(positive, positive, **settings), positive, dtype, roundings=2)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


@each_device
@each_dtype
@pytest.mark.parametrize("channels", [96, 192, 384, 8, 5])
@pytest.mark.parametrize("silu", [True, False])
def test_channel_norm_silu(device, dtype, channels: int, silu: bool) -> None:
    x = _channels_last(rand(2, channels, 3, 4, 5, dtype=dtype, device=device))
    x[0, :, 0, 0, 0] = 0
    broken = x.clone()
    broken[1, 0, 1, 2, 3] = POISON
    gamma = rand(channels, dtype=dtype, device=device, seed=1).view(-1, 1, 1, 1)
    normed = x.double() / x.double().norm(dim=1, keepdim=True).clamp_min(1e-12) * channels**0.5 * gamma.double()
    near(native.channel_norm_silu(x, gamma, silu=silu), F.silu(normed) if silu else normed, dtype, roundings=3)
    buffer = torch.full((2, 5, 4, 5, channels), POISON, dtype=dtype, device=device).permute(0, 4, 1, 2, 3)
    native.channel_norm_silu(x, gamma, silu=silu, out=buffer[:, :, 2:])
    assert torch.equal(buffer[:, :, 2:], native.channel_norm_silu(x, gamma, silu=silu))
    assert buffer[:, :, :2].isnan().all(), "what lies before stays"
    result = native.channel_norm_silu(broken, gamma, silu=silu)
    assert result[1, :, 1, 2, 3].isnan().all(), "one NaN is a whole pixel's, as in torch"
    assert result.isnan().sum() == channels
    torch.testing.assert_close(
        native.channel_norm_silu(x, gamma, silu=silu),
        reference.channel_norm_silu(x, gamma, silu=silu),
        rtol=3 * RELATIVE[dtype],
        atol=1e-5 if dtype == torch.float32 else 2e-2,
    )


ADDENDS = [(True, True), (False, True), (True, False)]


def _addends(x: Tensor, given: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """(bias, residual) for pictures, some of them missing."""
    bias = rand(x.size(1), dtype=x.dtype, device=x.device, seed=1)
    residual = _channels_last(rand(*x.shape, dtype=x.dtype, device=x.device, seed=2))
    return (bias if given[0] else None), (residual if given[1] else None)


@each_device
@each_dtype
@pytest.mark.parametrize("channels", [96, 192, 384, 8, 3])
@pytest.mark.parametrize("given", ADDENDS)
def test_upsample_and_bias_residual(device, dtype, channels: int, given: tuple[bool, bool]) -> None:
    x = _channels_last(rand(2, channels, 3, 4, 5, dtype=dtype, device=device))
    before = x.clone()
    bias, residual = _addends(x, given)
    assert torch.equal(native.upsample_nearest(x), reference.upsample_nearest(x))
    expected = reference.bias_residual(x.clone(), bias, residual)
    same_but_for_ties(native.upsample_nearest(x, bias=bias, residual=residual), reference.upsample_nearest(expected))
    buffer = torch.full((2, 5, 4, 5, channels), POISON, dtype=dtype, device=device).permute(0, 4, 1, 2, 3)
    ours = native.bias_residual(x, bias, residual, out=buffer[:, :, 2:])
    same_but_for_ties(ours, expected)
    assert buffer[:, :, :2].isnan().all(), "what lies before stays"
    assert torch.equal(x, before)
    in_place = x.clone()
    assert native.bias_residual(in_place, bias, residual) is in_place
    assert torch.equal(in_place, ours)


@each_device
@each_dtype
@pytest.mark.parametrize("channels", [96, 192, 384, 8, 5])
@pytest.mark.parametrize("given", ADDENDS)
def test_the_norm_of_a_sum_is_that_of_the_sum_made_before(device, dtype, channels: int, given) -> None:
    x = _channels_last(rand(2, channels, 2, 3, 7, dtype=dtype, device=device))
    before, gamma = x.clone(), rand(channels, dtype=dtype, device=device, seed=3)
    bias, residual = _addends(x, given)
    total = native.bias_residual(x.clone(), bias, residual)
    joined = native.channel_norm_silu(x, gamma, bias=bias, residual=residual)
    # Two kernels may round a sum's last bit otherwise, and the CPU twin's lanes do.
    torch.testing.assert_close(joined, native.channel_norm_silu(total, gamma), rtol=3 * RELATIVE[dtype], atol=1e-5)
    assert torch.equal(x, before if residual is None else total)
    same_but_for_ties(
        native.channel_norm_silu(before.clone(), gamma, bias=bias, residual=residual, silu=False),
        reference.channel_norm_silu(before.clone(), gamma, bias=bias, residual=residual, silu=False),
    )


@each_device
def test_pictures_may_be_every_second_frame_and_half_the_channels(device) -> None:
    """As the decoder enlarges what a temporal convolution made: halves of its channels are frames in turn."""
    halves = _channels_last(rand(1, 2 * 96, 3, 2, 5, device=device))
    bias = rand(2 * 96, device=device, seed=1)
    out = torch.empty(1, 6, 4, 10, 96, device=device).permute(0, 4, 1, 2, 3)
    for half in range(2):
        part = slice(96 * half, 96 * (half + 1))
        native.upsample_nearest(halves[:, part], bias=bias[part], out=out[:, :, half::2])
    frames = (halves + bias.view(-1, 1, 1, 1)).unflatten(1, (2, 96)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    assert torch.equal(out, reference.upsample_nearest(frames))


@each_device
def test_nothing_to_do_is_done(device) -> None:
    none, rows = torch.empty(2, 0, 16, device=device), torch.ones(2, 16, device=device)
    assert native.norm_scale_shift(none, rows, rows, num_history=0, eps=EPS).shape == none.shape
    native.gated_residual_(none, none, rows, num_history=0)
    native.rms_norm_(none, rows[0], eps=EPS)
    native.qk_rms_norm_rope_(
        torch.empty(1, 0, 48, device=device), rows[0], rows[0], torch.empty(0, 4, 2, device=device), eps=EPS
    )
    assert native.patch_rows(torch.ones(1, 1, 2, 2, 2, device=device), (1, 1, 1), rows=slice(3, 3)).shape == (1, 0, 1)
    assert native.unpack_heads(torch.empty(0, device=device), (1, 0, 2, 4), (1, 1)).shape == (1, 0, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, r: native._ops.residual_gate_norm(
                x, None, None, r, r, x.transpose(0, 1).contiguous(), None, 0, EPS
            ),
            "size",
        ),
        (
            lambda x, r: native._ops.residual_gate_norm(x, x.bfloat16(), None, None, None, None, None, 0, EPS),
            "wrong dtype",
        ),
        (lambda x, r: native._ops.residual_gate_norm(x, x, None, None, None, None, None, 9, EPS), "num_history"),
        (
            lambda x, r: native._ops.residual_gate_norm(x, None, None, r, r, x.clone(), x[..., :1], 0, EPS),
            "wrong dtype",
        ),
        (
            lambda x, r: native._ops.residual_gate_norm(x, None, None, r, r, x.byte(), x.clone(), 0, EPS),
            r"scale must be \[batch, rows, 1\]",
        ),
        (
            lambda x, r: native._ops.residual_gate_norm(x, x, None, None, None, None, x[..., :1], 0, EPS),
            "scales are of an out",
        ),
        (
            lambda x, r: native._ops.residual_gate_norm(x.transpose(1, 2), None, None, r, r, None, None, 0, EPS),
            "side by side",
        ),
        (lambda x, r: native._ops.rmsnorm_rows(x, r[0, :8], EPS), "16 elements"),
        (lambda x, r: native._ops.rmsnorm_rows(x.double(), r[0], EPS), "float32, bfloat16 or float16"),
        (lambda x, r: native._ops.unpack_heads(x, x[None], [1]), "heads must sum"),
        (lambda x, r: native._ops.unpack_heads(x, x.view(1, 2, 3, 16), [5, -2]), "negative"),
        (lambda x, r: native._ops.patch_gather(x[None, None], torch.zeros(1, 2, 1), [1, 1, 1], 95), "outside"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(2, 3, 16), torch.zeros(2, 16))


def _opcheck_calls() -> dict[str, tuple]:
    x, rows = rand(1, 4, 96), rand(2, 96)
    qkv, weights, rotation, scale = _qkv_case(torch.float32, "cpu", 3, 16, batch=1)
    latents, velocity, patch = _step_case(torch.float32, True, "cpu")
    pictures = _channels_last(rand(1, 8, 2, 3, 4))
    doubled = torch.empty(1, 2, 6, 8, 8).permute(0, 4, 1, 2, 3)
    table, index = torch.full((2, 8), 0.5, dtype=torch.float64), torch.tensor([1])
    return {
        "residual_gate_norm": (x, x.clone(), rows, rows, rows, torch.empty_like(x), None, 2, EPS),
        "qk_rmsnorm_rope": (qkv, *weights, rotation, scale, 2, 1, EPS),
        "qk_rmsnorm_rope_pack": (qkv, *weights, rotation, scale, torch.zeros(qkv.numel()), [2, 1], 2, 0, EPS),
        "rmsnorm_rows": (x, rows[0], EPS),
        "unpack_heads": (rand(60), torch.empty(1, 5, 3, 4), [1, 2]),
        "merge_partials": (rand(5, 4), rand(5), rand(5, 4, seed=1), rand(5, seed=1)),
        "patch_gather": (latents, torch.empty(2, 18, 16), list(patch), 0),
        "euler_step": (latents, velocity, table[:, :1].contiguous(), index, list(patch)),
        "dmd_step": (latents, velocity, latents.clone(), table[:, :2].contiguous(), index, list(patch)),
        "unipc_step": (latents, velocity, latents[None].clone(), latents.clone(), table, index, list(patch)),
        "upsample_renoise": (
            latents,
            rand(latents.numel(), 4),
            rand(4, 4),
            torch.empty(2, 4, 3, 8, 12),
            0.5,
            0.5,
            True,
        ),
        "cfg_combine": (x, x.clone(), torch.empty_like(x), torch.empty(1, 64, 2, dtype=torch.float64), 3.0),
        "channel_norm_silu": (pictures, rand(8), rand(8), pictures.clone(), torch.empty_like(pictures), True),
        "upsample_nearest": (pictures, rand(8), pictures.clone(), doubled),
        "bias_residual": (pictures, rand(8), pictures.clone(), torch.empty_like(pictures)),
        "quantize_rows": (x, torch.empty(1, 4, 96, dtype=torch.uint8), torch.empty(4), True),
        "quantize_heads": (
            *(heads := [rand(1, 4, 2, 8, seed=seed) for seed in range(3)]),
            *(part.to(torch.uint8) for part in heads),
            *(torch.empty(1, 2) for _ in heads),
            torch.empty(3 * 2 * 128),
        ),
    }


@pytest.mark.parametrize("name", native.OPERATORS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.helios, name).default
    torch.library.opcheck(
        operator, _opcheck_calls()[name], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_every_operator_is_listed_and_described() -> None:
    assert set(_opcheck_calls()) == set(native.OPERATORS)
    assert "compiled" in native.describe()[0]


@each_device
@each_dtype
def test_infinities_and_nan_stay_what_they_are(device, dtype) -> None:
    """Rounding to 16 bits by adding to the bits would turn some NaN into numbers."""
    x = torch.zeros(1, 1, 64, dtype=dtype, device=device)
    update = torch.zeros_like(x)
    update[0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    native.gated_residual_(x, update, None, num_history=0)
    assert x[0, 0, 0].isnan()
    assert x[0, 0, 1:3].tolist() == [float("inf"), float("-inf")]
    assert not x[0, 0, 3:].any()
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # NaN of all kinds
    assert native.patch_rows(bits.view(1, 3, 1, 1, 1).to(device), (1, 1, 1), dtype=dtype).isnan().all()


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("reference", 0, ("compiled operators are not used: HELIOS_OPS=reference", "plain torch everywhere")),
        ("native", 0, ("CPU: compiled",)),
        ("fast", 2, ("HELIOS_OPS must be native, reference or a library (.so), got 'fast'",)),
        ("nowhere/lib.so", 2, ("HELIOS_OPS=nowhere/lib.so, but nowhere/lib.so cannot be used: there is no such file",)),
    ],
)
def test_the_choice_is_said_aloud(setting: str, code: int, said: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "helios_engine.cli", "inspect", "--ops"]
    result = subprocess.run(command, env={**os.environ, "HELIOS_OPS": setting}, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    for text in said:
        assert text in result.stdout + result.stderr


def test_kernels_that_a_gpu_lacks_are_said_once_or_fatal(monkeypatch, caplog) -> None:
    gpu = torch.device("cuda", 0)
    native._serves_gpu.cache_clear()
    monkeypatch.setattr(native, "_ON_GPU", False)
    monkeypatch.setattr(native, "_WANTED", "")
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert not native.serves(gpu)
    assert [r.message for r in caplog.records] == [
        "compiled operators are not used on the GPU: this build has no CUDA kernels (no nvcc was found, or HELIOS_CUDA=0); "
        "torch's own are"
    ]
    native.check(gpu)
    monkeypatch.setattr(native, "_WANTED", "native")
    with pytest.raises(
        ValueError, match="HELIOS_OPS=native, but .* does not serve cuda:0: this build has no CUDA kernels"
    ):
        native.check(gpu)
    native.check(torch.device("cpu"))
    native._serves_gpu.cache_clear()
    monkeypatch.setattr(native, "_ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(ValueError, match="no kernels for sm_75"):
        native.check(gpu)
    assert not native.serves(gpu)
    native._serves_gpu.cache_clear()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_agree(isa: str) -> None:
    """The same rows through another instruction set: sums in another order, nothing more."""
    script = (
        "import torch; from helios_engine.ops import native; torch.manual_seed(0); x = torch.randn(1, 3, 5120).bfloat16();"
        "w = torch.randn(2, 5120); print(native.norm_scale_shift(x, w, w, num_history=1, eps=1e-6).double().sum().item())"
    )
    sums = [
        float(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout)
        for environment in (dict(os.environ), {**os.environ, "HELIOS_CPU_ISA": isa})
    ]
    assert sums[0] == pytest.approx(sums[1], abs=0.5)
