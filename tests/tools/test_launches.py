"""What the 14 B model launches on a GPU and how much it moves, traced without one."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from helios_engine.cli import main
from helios_engine.config import ModelConfig, VaeConfig
from helios_engine.ops import native
from helios_engine.tools.launches import Launch, launches_per_block, summary, trace_decode, trace_forward

pytestmark = pytest.mark.skipif(bool(native.WHY_NOT), reason=f"no compiled operators: {native.WHY_NOT}")

LATENTS = (48, 80)  # 384x640
STAGES = [(12, 20), (24, 40), (48, 80)]
CACHE = {"FrameCache.keep", "CausalConv3d._with_past"}  # past frames of the causal convolutions


@functools.cache
def decode(dtype: torch.dtype = torch.float32) -> list[Launch]:
    return trace_decode(VaeConfig(), LATENTS, dtype=dtype, frames_per_call=8)


@functools.cache
def forward(stage: tuple[int, int]) -> list[Launch]:
    return trace_forward(ModelConfig(), LATENTS, stage, dtype=torch.bfloat16)


def large(found: list[Launch]) -> list[Launch]:
    return [launch for launch in found if launch.num_bytes > 5e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_stays_channels_last(dtype: torch.dtype) -> None:
    other = [str(launch) for launch in large(decode(dtype)) if set(launch.layouts) - {"channels-last"}]
    assert other == []
    assert sum(launch.kind == "convolution" for launch in decode(dtype)) == 71


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied_but_past_frames(dtype: torch.dtype) -> None:
    assert {launch.where for launch in large(decode(dtype)) if launch.kind in ("copy", "fill")} == CACHE


def test_no_bias_and_no_enlargement_has_a_pass_of_its_own() -> None:
    # What is left elementwise are the pixels' limits.
    assert [launch.name for launch in large(decode()) if launch.kind == "elementwise"] == ["clamp_"]
    names = {launch.name for launch in decode() if launch.kind == "operator"}
    assert names == {"channel_norm_silu", "upsample_nearest", "bias_residual"}
    # A sum of its own is made where no norm and no enlargement reads it first: before the temporal convolutions and the
    # convolution of the input, behind the last one, and for the one block that brings 192 channels to 384.
    sums = [launch for launch in decode() if launch.name == "bias_residual"]
    assert {launch.where for launch in sums} == {"Sum.copied_to", "Sum.whole"}
    assert sum(launch.num_bytes for launch in sums) < 4e9
    assert sum(launch.where == "Sum.whole" for launch in sums) == 2


def test_bytes_of_a_decode() -> None:
    """195 GB before sums were left open; the operators' page has the number."""
    moved = summary(decode())["gigabytes_beside_convolutions"]
    assert 115 < moved <= 125


@pytest.mark.parametrize("stage", STAGES)
def test_a_block_is_thirteen_launches(stage: tuple[int, int]) -> None:
    found, layers = forward(stage), ModelConfig().num_layers
    assert launches_per_block(found, layers) <= 13 + 1 / layers  # one norm more before the first block
    assert len(found) <= 13 * layers + 20
    inside = [launch for launch in found if launch.where.startswith(("Block.", "Transformer._attend_self_"))]
    assert len(inside) > 400
    assert [str(launch) for launch in inside if launch.kind in ("copy", "fill") and launch.num_bytes > 1e6] == []


def test_the_trace_sees_what_it_is_asked_about() -> None:
    """A copy, an odd layout and a bias of its own would be found."""
    from helios_engine.tools.launches import META, trace

    pictures = torch.empty(1, 8, 4, 64, 64, device=META)
    last = pictures.contiguous(memory_format=torch.channels_last_3d)
    conv = torch.nn.Conv3d(8, 8, 1, device=META)
    plain, made_last, added, joined = trace(
        lambda: (conv(pictures), conv(last), last.add_(1.0), torch.cat([last, pictures]))
    )
    assert plain.layouts[-1] == "contiguous"
    assert made_last.layouts[-1] == "channels-last"
    assert (added.kind, added.num_bytes) == ("elementwise", 2 * last.nbytes)
    assert (joined.kind, joined.num_bytes) == ("copy", 4 * last.nbytes)


def test_the_command_prints_it(toy, capsys) -> None:
    assert main(["bench", "--model", str(toy / "distilled"), "--trace", "--height", "64", "--width", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["forward"]) == {"2x2", "4x4", "8x8"}
    assert found["forward"]["8x8"]["launches_per_block"] <= 13.5  # of two blocks, the first one's norm counted
    assert found["decode"]["launches_by_kind"]["convolution"] == 71
    assert main(["bench", "--model", str(toy / "distilled"), "--trace", "--bytes"]) == 2
    assert "ask one at a time" in capsys.readouterr().err
    assert main(["bench", "--model", str(toy / "distilled"), "--trace", "--num-gpus", "2"]) == 2
    assert "trace is of one rank" in capsys.readouterr().err
