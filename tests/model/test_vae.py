"""The video autoencoder against AutoencoderKLWan: every split of a chunk, both directions, and 16-bit numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from helios_engine.config import VaeConfig
from helios_engine.model.vae import CausalConv3d, VideoAutoencoder, to_uint8, to_unit_range
from helios_engine.model.vae_layers import Sum
from helios_engine.ops import native
from tests.helpers import oracle

# float32 through about thirty convolutions, outputs in [-1, 1].
TOLERANCE = 3e-5


def _pair(seed: int, dim: int = 8) -> tuple[AutoencoderKLWan, VideoAutoencoder]:
    reference = oracle.vae(dim, 4, seed)
    config = VaeConfig(
        base_dim=dim,
        z_dim=4,
        latents_mean=tuple(reference.config.latents_mean),
        latents_std=tuple(reference.config.latents_std),
    )
    ours = VideoAutoencoder(config)
    slots = ours.checkpoint_slots()
    expected = reference.state_dict()
    assert {k: tuple(v.shape) for k, v in slots.items()} == {k: tuple(v.shape) for k, v in expected.items()}
    for name, tensor in expected.items():
        slots[name].copy_(tensor)
    return reference, ours.channels_last_()


def _latents(reference: AutoencoderKLWan, frames: int = 9, height: int = 6, width: int = 10) -> torch.Tensor:
    return torch.randn(
        1, reference.config.z_dim, frames, height, width, generator=torch.Generator().manual_seed(frames)
    )


@pytest.mark.parametrize("frames_per_call", [None, 1, 2, 3, 4, 8])
def test_decode_equals_diffusers(frames_per_call: int | None) -> None:
    reference, ours = _pair(0)
    latents = _latents(reference)
    expected = reference.decode(ours.denormalize(latents)).sample
    actual = ours.decode(latents, frames_per_call=frames_per_call)
    assert actual.shape == expected.shape == (1, 3, 33, 48, 80)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decode_of_other_lengths(frames: int) -> None:
    reference, ours = _pair(1)
    latents = _latents(reference, frames)
    expected = reference.decode(ours.denormalize(latents)).sample
    torch.testing.assert_close(ours.decode(latents), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("operators", ["compiled", "plain torch"])
@pytest.mark.parametrize(("frames", "frames_per_call"), [(9, None), (9, 3), (2, 1), (1, None)])
def test_sums_left_open_as_on_a_gpu_are_the_same(monkeypatch, operators: str, frames: int, frames_per_call) -> None:
    """On a GPU every convolution leaves its bias to whoever reads its result next: none may be lost or added twice."""
    reference, ours = _pair(5)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):  # as large as what they are added to
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    reference.load_state_dict(ours.state_dict())
    latents = torch.cat([_latents(reference, frames), _latents(reference, frames).flip(-1)])
    pixels = torch.rand(2, 3, 4 * frames - 3, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference.decode(ours.denormalize(latents)).sample
    moments = reference.encode(pixels).latent_dist
    monkeypatch.setattr(native, "is_gpu", lambda device: True)
    if operators == "plain torch":
        monkeypatch.setattr(native, "runs_native", lambda x: False)
    left_open = []
    plus = Sum.plus
    monkeypatch.setattr(Sum, "plus", lambda one, other: left_open.append(one.bias is not None) or plus(one, other))
    decoded = ours.decode(latents, frames_per_call=frames_per_call)
    mean, std = ours.encode(pixels, frames_per_call=frames_per_call)
    assert any(left_open)
    assert 0.1 < expected.abs().mean() < 0.9
    torch.testing.assert_close(decoded, expected, rtol=0, atol=5 * TOLERANCE)
    torch.testing.assert_close(mean, moments.mean, rtol=0, atol=5 * TOLERANCE)
    torch.testing.assert_close(std, moments.std, rtol=1e-4, atol=5 * TOLERANCE)


@pytest.mark.parametrize("frames", [1, 5, 33])
def test_encode_equals_diffusers(frames: int) -> None:
    reference, ours = _pair(2)
    pixels = torch.rand(2, 3, frames, 48, 64) * 2 - 1
    expected = reference.encode(pixels).latent_dist
    mean, std = ours.encode(pixels)
    torch.testing.assert_close(mean, expected.mean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(std, expected.std, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("frames_per_call", [1, 3, 8])
def test_encode_in_pieces_equals_encode_at_once(frames_per_call: int) -> None:
    _, ours = _pair(2)
    pixels = torch.rand(1, 3, 33, 48, 64) * 2 - 1
    for whole, split in zip(ours.encode(pixels), ours.encode(pixels, frames_per_call=frames_per_call), strict=True):
        torch.testing.assert_close(split, whole, rtol=0, atol=TOLERANCE)


def test_activations_stay_channels_last() -> None:
    _, ours = _pair(0)
    layouts = []
    for layer in ours.decoder.modules():
        if isinstance(layer, CausalConv3d) and layer.num_past:
            layer.register_forward_hook(
                lambda _, args, __: layouts.append(args[0].x.is_contiguous(memory_format=torch.channels_last_3d))
            )
    ours.decode(torch.randn(1, 4, 9, 4, 4))
    assert sum(layouts) >= 0.9 * len(layouts)


def test_chunks_share_nothing() -> None:
    _, ours = _pair(3)
    first, second = torch.randn(2, 1, 4, 9, 4, 4).unbind(0)
    alone = ours.decode(second)
    ours.decode(first)
    assert torch.equal(ours.decode(second), alone)


def test_normalising_is_its_own_inverse() -> None:
    _, ours = _pair(0)
    latents = torch.randn(1, 4, 9, 2, 2)
    torch.testing.assert_close(ours.normalize(ours.denormalize(latents)), latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_decode_is_no_worse_than_diffusers(dtype: torch.dtype) -> None:
    reference, ours = _pair(4)
    latents = _latents(reference, 3)
    wide = ours.denormalize(latents)
    exact = reference.double().decode(wide.double()).sample
    theirs = reference.to(dtype).decode(wide.to(dtype)).sample.double()
    actual = ours.to(dtype).decode(latents)
    assert actual.dtype == dtype
    our_error, their_error = (actual.double() - exact).norm(), (theirs - exact).norm()
    assert our_error <= 1.1 * their_error, (our_error, their_error)


def test_pixel_conversions_round_and_clamp() -> None:
    pixels = torch.tensor([-1.0, 1.0, 0.0, 0.999, -1.5, 2.0])
    assert to_uint8(pixels).tolist() == [0, 255, 128, 255, 0, 255]
    torch.testing.assert_close(to_unit_range(pixels), torch.tensor([0.0, 1.0, 0.5, 0.9995, 0.0, 1.0]))
