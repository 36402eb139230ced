"""Rows in 8 bits: every number as torch itself rounds it, on both twins."""

from __future__ import annotations

import pytest
import torch

from helios_engine.ops import native, reference
from helios_engine.ops.reference import EightBitRows
from tests.ops.test_native import each_device, each_dtype, rand

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")


def assert_equal(actual: EightBitRows, expected: EightBitRows) -> None:
    assert actual.shape == expected.shape
    assert actual.values.dtype == expected.values.dtype == torch.float8_e4m3fn
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert actual.scale.shape == expected.scale.shape
    assert torch.equal(actual.scale.view(torch.int32), expected.scale.view(torch.int32))


def assert_same(x: torch.Tensor) -> None:
    assert_equal(native.quantize_rows(x), reference.quantize_rows(x))


@each_device
@each_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 5120, 13824])
def test_rows_of_any_width_and_size(device, dtype, width: int) -> None:
    sizes = torch.logspace(-4, 4, 5, device=device)[:, None]
    assert_same((rand(2, 5, width, device=device) * sizes).to(dtype))


@each_device
def test_every_bfloat16_number_up_to_448(device) -> None:
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= 448].to(device)
    assert numbers.numel() > 30000
    assert_same(numbers.view(1, 1, -1))  # the largest is 448, so the scale is 1
    wide = torch.cat([rand(100_000, device=device) * 2.0**e for e in (-9, -6, 0, 6)]).clamp_(-448, 448)
    ties = torch.arange(1, 448 * 16, device=device) / 16.0
    assert_same(torch.cat([wide, ties, ties.new_tensor([448.0])]).view(1, 1, -1))


@each_device
@each_dtype
def test_what_is_no_number_stays_in_its_row(device, dtype) -> None:
    x = rand(1, 5, 96, dtype=dtype, device=device)
    clean = native.quantize_rows(x)
    x[0, 1, 3], x[0, 2, 95], x[0, 3] = float("nan"), float("inf"), 0.0
    rows = native.quantize_rows(x)
    out, scale = rows.values, rows.scale
    assert out[0, 1].float().isnan().all()
    assert scale[0, 1].isnan()
    assert out[0, 2].float().isnan().sum() == 1
    assert (out[0, 3].float() == 0).all()
    for row in (0, 4):
        assert torch.equal(out[0, row].view(torch.uint8), clean.values[0, row].view(torch.uint8))
        assert scale[0, row] == clean.scale[0, row]


@each_device
@each_dtype
def test_strided_and_odd_rows(device, dtype) -> None:
    whole = rand(2, 6, 200, dtype=dtype, device=device)
    for part in (whole[:, 2:], whole[..., :96], whole[:, ::2, 4:100], whole[..., 3:99], whole[:, :0]):
        assert_same(part)


@each_device
@each_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 13824])
def test_rows_through_gelu(device, dtype, width: int) -> None:
    """tanh differs between libraries in its last bits, which may tip a rounding: one step of e4m3, seldom."""
    x = (rand(2, 5, width, device=device) * 2).to(dtype)
    ours, expected = native.quantize_rows(x, gelu=True), reference.quantize_rows(x, gelu=True)
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-2, atol=0)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert (ours.values.double() * ours.scale - exact).norm() <= 0.05 * exact.norm()
    steps = (ours.values.view(torch.uint8).int() - expected.values.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= 1e-2 * steps.numel()


@each_device
@each_dtype
@pytest.mark.parametrize("width", [7, 96, 5120])
@pytest.mark.parametrize("num_history", [0, 2, 6])
def test_norms_write_what_rounding_their_result_gives(device, dtype, width: int, num_history: int) -> None:
    x, update = (rand(2, 6, width, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    gate, weight, bias = (rand(2, width, device=device, seed=seed) for seed in (3, 4, 5))
    settings = {"num_history": num_history, "eps": 1e-6}
    expected = native.quantize_rows(native.norm_scale_shift(x, weight, bias, **settings))
    ours = native.norm_scale_shift(x, weight, bias, **settings, out=EightBitRows.empty_like(x))
    assert_equal(ours, expected)
    for ops in (native, reference):
        near = ops.norm_scale_shift(x, weight, bias, **settings, out=EightBitRows.empty_like(x))
        torch.testing.assert_close(near.scale, ours.scale, rtol=1e-2, atol=0)
    one, other = x.clone(), x.clone()
    expected = native.quantize_rows(native.residual_gate_norm_(one, update, gate, weight, bias, **settings))
    whole = EightBitRows(
        torch.zeros(2, 9, width, device=device).to(torch.float8_e4m3fn), torch.zeros(2, 9, 1, device=device)
    )
    native.residual_gate_norm_(other, update, gate, weight, bias, **settings, out=whole[:, 2:8])
    assert torch.equal(one, other)
    assert_equal(whole[:, 2:8].clone(), expected)
    for rows in (whole[:, :2], whole[:, 8:]):
        assert not rows.values.float().any()
        assert not rows.scale.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((rand(1, 2, 8), torch.empty(1, 2, 8), torch.empty(2)), "out has the wrong dtype"),
        ((rand(1, 2, 8), torch.empty(1, 2, 7, dtype=torch.uint8), torch.empty(2)), "out must have size 8"),
        ((rand(1, 2, 8), torch.empty(1, 2, 8, dtype=torch.uint8), torch.empty(3)), "scale must hold 2 elements"),
        ((rand(2, 8), torch.empty(2, 8, dtype=torch.uint8), torch.empty(2)), "x must be"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native._ops.quantize_rows(*arguments, False)


def _heads_case(dtype: torch.dtype, device: str, heads: int, head_dim: int) -> list[torch.Tensor]:
    """q, k and v as views of one product, with fewer queries than keys, heads of very different sizes."""
    qkv = rand(2, 300, 3, heads, head_dim, device=device) * torch.logspace(-3, 3, heads, device=device)[:, None]
    q, k, v = qkv.to(dtype).unbind(2)
    return [q[:, 17:], k, v]


@each_device
@each_dtype
@pytest.mark.parametrize(("heads", "head_dim"), [(40, 128), (3, 64), (2, 12), (3, 5)])
def test_heads_are_rounded_as_plain_torch_does(device, dtype, heads: int, head_dim: int) -> None:
    operands = _heads_case(dtype, device, heads, head_dim)
    values, scales = native.quantize_heads(*operands)
    expected, expected_scales = reference.quantize_heads(*operands)
    for x, value, scale, *pair in zip(operands, values, scales, expected, expected_scales, strict=True):
        assert value.shape == x.shape
        assert value.is_contiguous()
        assert torch.equal(value.view(torch.uint8), pair[0].view(torch.uint8))
        assert torch.equal(scale, pair[1])
        error = (value.float() * scale[:, None, :, None] - x.float()).abs()
        assert (error <= x.float().abs() / 16 + scale[:, None, :, None] * 2**-9).all(), "three bits of mantissa"


@each_device
def test_a_nan_is_its_heads_alone_and_few_rows_are_enough(device) -> None:
    q, k, v = _heads_case(torch.bfloat16, device, 3, 128)
    k[1, 3, 2, 7] = float("nan")
    (q8, k8, v8), scales = native.quantize_heads(q[:, :1], k, v[:, :130])
    assert k8[1, :, 2].float().isnan().all()
    assert k8.float().isnan().sum() == k.size(1) * 128
    assert not any(values.float().isnan().any() for values in (q8, v8))
    assert scales[0].shape == (2, 3)


def test_heads_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, 4, 2, 8)
    out, scale = torch.zeros(1, 4, 2, 8, dtype=torch.uint8), torch.zeros(1, 2)
    call = torch.ops.helios.quantize_heads
    with pytest.raises(RuntimeError, match="batch, heads and head size of q"):
        call(x, x[:, :, :1], x, out, out, out, scale, scale, scale, torch.zeros(768))
    with pytest.raises(RuntimeError, match="workspace must hold 768"):
        call(x, x, x, out, out, out, scale, scale, scale, torch.zeros(7))
    with pytest.raises(RuntimeError, match="heads lie side by side"):
        call(x, x.transpose(1, 2).contiguous().transpose(1, 2), x, out, out, out, scale, scale, scale, torch.zeros(768))
