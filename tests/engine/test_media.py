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
    pixels = np.random.default_rng(0).random((40, 40, 56, 3), dtype=np.float32)
    clip = pixels if kind == "array" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = PROCESSOR.preprocess_video(clip, height=64, width=32)
    actual = media.load_video(clip, height=64, width=32)
    torch.testing.assert_close(actual.tail_BCTHW, expected[:, :, -33:])
    torch.testing.assert_close(actual.first_BCTHW, expected[:, :, :1])
    assert actual.num_frames == 40


def test_pil_clip_equals_diffusers() -> None:
    clip = [oracle.random_image(i, 72, 104) for i in range(140)]
    expected = PROCESSOR.preprocess_video(clip, height=64, width=64)
    actual = media.load_video(clip, height=64, width=64)
    assert torch.equal(actual.first_BCTHW, expected[:, :, :1])
    assert torch.equal(actual.tail_BCTHW, expected[:, :, -99:])
    assert actual.num_frames == 140


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
    clip = media.load_video(tmp_path / "clip.mp4", height=64, width=64)
    assert clip.num_frames == 40
    pixels = torch.cat([clip.first_BCTHW, clip.tail_BCTHW], dim=2)
    expected = torch.tensor([0, *range(7, 40)]) * 4 / 127.5 - 1
    torch.testing.assert_close(pixels.mean((0, 1, 3, 4)), expected, rtol=0, atol=0.03)


def test_a_camera_picture_is_turned_the_right_way_up(tmp_path) -> None:
    upright = oracle.random_image(3, 64, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # the sensor was turned: show it rotated by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "phone.png", exif=exif)
    expected = media.load_image(upright, height=64, width=96)
    assert torch.equal(media.load_image(tmp_path / "phone.png", height=64, width=96), expected)


def test_a_long_clip_is_never_held_whole() -> None:
    class Frames(list):
        """Hands out frames one at a time and counts how many are alive."""

        def __len__(self) -> int:
            return 1000

        def __iter__(self):
            return (np.full((64, 64, 3), index % 256, np.uint8) for index in range(1000))

    clip = media.load_video(Frames(), height=64, width=64)
    assert clip.num_frames == 1000
    assert clip.tail_BCTHW.size(2) == 99
    assert clip.tail_BCTHW[0, 0, -1, 0, 0].item() == pytest.approx((999 % 256) / 127.5 - 1)
