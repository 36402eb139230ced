"""Rows in 8 bits: every number as torch itself rounds it, on both twins."""

from __future__ import annotations

import pytest
import torch

from helios_engine.ops import native, reference
from tests.ops.test_native import each_device, each_dtype, rand

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")


def assert_same(x: torch.Tensor) -> None:
    for actual, expected in zip(native.quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        bits = torch.uint8 if actual.dtype == torch.float8_e4m3fn else torch.int32
        assert torch.equal(actual.view(bits), expected.view(bits))


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
    clean, scales = native.quantize_rows(x)
    x[0, 1, 3], x[0, 2, 95], x[0, 3] = float("nan"), float("inf"), 0.0
    out, scale = native.quantize_rows(x)
    assert out[0, 1].float().isnan().all()
    assert scale[0, 1].isnan()
    assert out[0, 2].float().isnan().sum() == 1
    assert (out[0, 3].float() == 0).all()
    for row in (0, 4):
        assert torch.equal(out[0, row].view(torch.uint8), clean[0, row].view(torch.uint8))
        assert scale[0, row] == scales[0, row]


@each_device
@each_dtype
def test_strided_and_odd_rows(device, dtype) -> None:
    whole = rand(2, 6, 200, dtype=dtype, device=device)
    for part in (whole[:, 2:], whole[..., :96], whole[:, ::2, 4:100], whole[..., 3:99], whole[:, :0]):
        assert_same(part)


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
        native._ops.quantize_rows(*arguments)
