"""Pictures and clips against Diffusers' VideoProcessor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from helios_engine.engine import media
from tests.helpers import oracle

PROCESSOR = VideoProcessor(vae_scale_factor=8)


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_pil_images_equal_diffusers(size: tuple[int, int]) -> None:
    image = oracle.random_image(0, 72, 104)
    expected = PROCESSOR.preprocess(image, height=size[0], width=size[1])
    actual = media.load_image(image, height=size[0], width=size[1])
    assert torch.equal(actual[:, :, 0], expected)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_float_arrays_equal_diffusers(kind: str) -> None:
    pixels = np.random.default_rng(0).random((5, 40, 56, 3), dtype=np.float32)
    clip = pixels if kind == "array" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = PROCESSOR.preprocess_video(clip, height=64, width=32)
    torch.testing.assert_close(media.load_video(clip, height=64, width=32), expected)


def test_pil_clip_equals_diffusers() -> None:
    clip = [oracle.random_image(i, 72, 104) for i in range(4)]
    expected = PROCESSOR.preprocess_video(clip, height=64, width=64)
    assert torch.equal(media.load_video(clip, height=64, width=64), expected)


def test_uint8_is_read_as_0_to_255() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    expected = media.load_image(Image.fromarray(pixels), height=32, width=48)
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        torch.testing.assert_close(media.load_image(image, height=32, width=48), expected)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_every_picture_mode_becomes_rgb(mode: str, tmp_path) -> None:
    image = oracle.random_image(2, 64, 64).convert(mode)
    expected = media.load_image(image.convert("RGB"), height=64, width=64)
    assert torch.equal(media.load_image(image, height=64, width=64), expected)
    if mode != "CMYK":
        image.save(tmp_path / "image.png")
        assert torch.equal(media.load_image(tmp_path / "image.png", height=64, width=64), expected)


def test_video_files_are_read(tmp_path) -> None:
    pytest.importorskip("av")
    from helios_engine.output import open_writer
    from helios_engine.request import ChunkTiming, VideoChunk

    frames = np.stack([np.full((64, 64, 3), 4 * i, np.uint8) for i in range(40)])
    with open_writer(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(VideoChunk(0, frames, torch.zeros(1, 16, 9, 8, 8), ChunkTiming(0, 0)))
    pixels = media.load_video(tmp_path / "clip.mp4", height=64, width=64)
    assert pixels.shape == (1, 3, 40, 64, 64)
    expected = torch.arange(40) * 4 / 127.5 - 1
    torch.testing.assert_close(pixels.mean((0, 1, 3, 4)), expected, rtol=0, atol=0.03)
