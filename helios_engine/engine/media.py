"""Pictures and clips from files, PIL, numpy or torch to pixels in [-1, 1] at the video's size.

PIL images and files are converted to RGB and stretched with LANCZOS; arrays and tensors are resized by nearest
neighbour. Both equal Diffusers' VideoProcessor, which also stretches without keeping the aspect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, NUM_HISTORY_FRAMES
from helios_engine.optional import require
from helios_engine.request import FRAMES_PER_CHUNK

# 33-frame pieces that reach into the 19-frame history.
_MAX_PIECES = -(-NUM_HISTORY_FRAMES // LATENT_FRAMES_PER_CHUNK)


def load_image(image: object, *, height: int, width: int) -> Tensor:
    """One picture as [1, 3, 1, height, width] float32. Raises ValueError saying what is wrong with it."""
    if isinstance(image, str | Path):
        image = _read_image(Path(image))
    if not isinstance(image, Tensor | np.ndarray) and not _is_pil(image):
        raise ValueError(f"image must be a path, PIL image, array or tensor, got {type(image).__name__}")
    return _pixels([image], "image", height=height, width=width)


@dataclass(frozen=True, slots=True)
class Clip:
    """The parts of a video that a history is made of.

    first [1, 3, 1, H, W] is its first frame, tail [1, 3, <= 99, H, W] the end of its last whole 33-frame pieces, and
    num_frames its length.
    """

    first_BCTHW: Tensor
    tail_BCTHW: Tensor
    num_frames: int


def load_video(video: object, *, height: int, width: int) -> Clip:
    """A clip, however long, holding at most 100 of its frames. Raises ValueError saying what is wrong with it."""
    if isinstance(video, str | Path):
        frames: Iterable[object] = _read_video(Path(video))
    elif isinstance(video, Tensor | np.ndarray):
        if video.ndim == 5 and video.shape[0] == 1:
            video = video[0]
        if video.ndim != 4:
            raise ValueError(
                f"video must have 4 dimensions, (F, H, W, 3) or (F, 3, H, W) as a tensor, got {video.shape}"
            )
        frames = video
    elif isinstance(video, Sequence):
        frames = video
    else:
        raise ValueError(f"video must be a path, an array, a tensor or a list of images, got {type(video).__name__}")
    first, count = None, 0
    tail: deque[object] = deque(maxlen=_MAX_PIECES * FRAMES_PER_CHUNK)
    for frame in frames:
        first = frame if count == 0 else first
        tail.append(frame)
        count += 1
    if count < FRAMES_PER_CHUNK:
        raise ValueError(
            f"video must have at least {FRAMES_PER_CHUNK} frames to continue from, got {count}; use image for a single picture"
        )
    whole = min(_MAX_PIECES, count // FRAMES_PER_CHUNK) * FRAMES_PER_CHUNK
    size = {"height": height, "width": width}
    return Clip(_pixels([first], "video", **size), _pixels(list(tail)[-whole:], "video", **size), count)


def _read_image(path: Path) -> object:
    require("PIL", "reading pictures", "pillow")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            # Cameras store a picture as the sensor saw it and say which way is up.
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None


def _read_video(path: Path) -> Iterator[object]:
    av = require("av", "reading videos")
    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"video {path} has no picture stream")
            for frame in container.decode(video=0):
                yield frame.to_image()
    except av.FFmpegError as error:
        raise ValueError(f"video {path} cannot be read: {error}") from None


def _is_pil(image: object) -> bool:
    require("PIL", "conditioning on pictures", "pillow")
    from PIL import Image

    return isinstance(image, Image.Image)


def _pixels(images: list[object], name: str, *, height: int, width: int) -> Tensor:
    frames = [_one_image(image, name, height=height, width=width) for image in images]
    return (torch.stack(frames, dim=1) * 2.0 - 1.0)[None]


def _one_image(image: object, name: str, *, height: int, width: int) -> Tensor:
    """[3, height, width] in [0, 1]."""
    require("PIL", "conditioning on pictures", "pillow")
    from PIL import Image

    if isinstance(image, Image.Image):
        try:
            resized = image.convert("RGB").resize((width, height), resample=Image.Resampling.LANCZOS)
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error}") from None
        return torch.from_numpy(np.asarray(resized).astype(np.float32) / 255.0).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} arrays must have shape (H, W, 3), got {image.shape}")
        if image.dtype.kind not in "uif":
            raise ValueError(f"{name} must hold uint8 or floating point numbers, got {image.dtype}")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    elif not isinstance(image, Tensor):
        raise ValueError(f"{name} frames must be PIL images, arrays or tensors, got {type(image).__name__}")
    if image.ndim == 4 and image.size(0) == 1:
        image = image[0]
    if image.ndim != 3 or image.size(0) != 3:
        raise ValueError(f"{name} tensors must have shape (3, H, W), got {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(image.shape)}")
    return F.interpolate(_unit_floats(image, name)[None], size=(height, width))[0]


def _unit_floats(image: Tensor, name: str) -> Tensor:
    image = image.cpu()
    if image.dtype == torch.uint8:
        return image.float() / 255.0
    if not image.is_floating_point():
        raise ValueError(f"{name} must hold uint8 or floating point numbers, got {image.dtype}")
    image = image.float()
    if not bool(torch.isfinite(image).all()) or image.min() < 0 or image.max() > 1:
        raise ValueError(f"{name} floats must lie in [0, 1]; got {image.min():.4g} to {image.max():.4g}")
    return image
