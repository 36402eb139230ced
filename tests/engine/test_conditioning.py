"""Already encoded inputs, and how much of a clip is encoded."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from helios_engine import VideoRequest
from helios_engine.engine import conditioning
from helios_engine.engine.history import History
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.sampling.noise import NoiseSource
from tests.helpers import oracle

SMALL = {"prompt": "A red fox", "height": 64, "width": 64, "max_sequence_length": 16, "num_frames": 33, "steps": 1}


def _encode(vae: VideoAutoencoder, pixels: torch.Tensor, noise: NoiseSource) -> torch.Tensor:
    mean, std = vae.encode(pixels)
    return vae.normalize(mean + std * noise.normal(*mean.shape))


def test_encoded_image_equals_the_image(engines) -> None:
    engine = engines("distilled")
    image = oracle.random_image(0, 64, 64)
    pixels = conditioning.load_pixels(VideoRequest(**SMALL, image=image))
    noise = NoiseSource(42)
    anchor = _encode(engine.vae, pixels, noise)
    still = _encode(engine.vae, pixels.expand(-1, -1, 33, -1, -1), noise)[:, :, -1:]
    exact = {f"{kind}_noise_sigma_{end}": 0.0 for kind in ("image", "video") for end in ("min", "max")}
    sessions = [
        engine.open(VideoRequest(**SMALL, **exact, image=image)),
        engine.open(VideoRequest(**SMALL, **exact, image_latents=anchor, fake_image_latents=still)),
    ]
    for session in sessions:
        torch.testing.assert_close(session.history.anchor_BC1HW, anchor)
        torch.testing.assert_close(session.history.frames_BCTHW[:, :, -1:], still)
        assert session.history.frames_BCTHW[:, :, :-1].abs().max() == 0


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("own_anchor", [False, True])
def test_encoded_video_is_the_history(engines, pieces: int, own_anchor: bool) -> None:
    engine = engines("distilled")
    clip = torch.randn(1, 16, 9 * pieces, 8, 8)
    anchor = torch.randn(1, 16, 1, 8, 8)
    exact = {f"{kind}_noise_sigma_{end}": 0.0 for kind in ("image", "video") for end in ("min", "max")}
    given = {"image_latents": anchor} if own_anchor else {}
    history = engine.open(VideoRequest(**SMALL, **exact, video_latents=clip, **given)).history
    padded = torch.cat([torch.zeros(1, 16, 19, 8, 8), clip], dim=2)[:, :, -19:]
    assert torch.equal(history.frames_BCTHW, padded)
    assert torch.equal(history.anchor_BC1HW, anchor if own_anchor else clip[:, :, :1])


def test_of_a_long_clip_only_what_history_holds_is_encoded(engines) -> None:
    engine = engines("distilled")
    frames = torch.rand(33 * 6 + 5, 3, 64, 64)
    with mock.patch.object(VideoAutoencoder, "encode", autospec=True, side_effect=VideoAutoencoder.encode) as encode:
        engine.open(VideoRequest(**SMALL, video=frames))
    assert [call.args[1].size(2) for call in encode.call_args_list] == [1, 33, 33, 33]


def test_a_long_clip_equals_diffusers() -> None:
    """Skipping the older pieces' encoding must not shift the random numbers."""
    from dataclasses import replace

    case = replace(oracle.random_case("distilled", "v2v", 0), num_chunks=1, steps=(1, 1, 1))
    clip = [oracle.random_image(index, 64, 64) for index in range(33 * 5 + 2)]
    pipe = oracle.pipeline(case)
    expected = oracle.run(pipe, case, video=clip)
    import tempfile
    from pathlib import Path

    from helios_engine import Engine, EngineConfig

    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.load(oracle.save(pipe, Path(folder)), EngineConfig(device="cpu", dtype="float32"))
    video = engine.generate(VideoRequest(**{**oracle.request_arguments(case), "video": clip}))
    assert (video.latents - expected.latents).abs().max() <= 1e-4


def test_history_holds_19_frames_for_ever() -> None:
    history = History.empty(2, 4, 4, torch.device("cpu"))
    everything = torch.zeros(1, 2, 19, 4, 4)
    for _ in range(5):
        latents = torch.randn(1, 2, 9, 4, 4)
        history = history.after(latents)
        everything = torch.cat([everything, latents], dim=2)
        assert torch.equal(history.frames_BCTHW, everything[:, :, -19:])
    history = History(history.frames_BCTHW, torch.ones(1, 2, 1, 4, 4))
    window = history.window()
    assert torch.equal(window.long, everything[:, :, -19:-3])
    assert torch.equal(window.mid, everything[:, :, -3:-1])
    assert torch.equal(window.short, torch.cat([history.anchor_BC1HW, everything[:, :, -1:]], dim=2))
