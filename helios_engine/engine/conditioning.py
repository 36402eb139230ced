"""From a request's image or video to the history a video starts from, in the reference's order of random draws.

# latents [1, C, T, h, w] float32, normalised
Source: Diffusers HeliosPyramidPipeline.prepare_image_latents, prepare_video_latents and __call__.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK
from helios_engine.engine import media
from helios_engine.engine.frames import FrameCodec
from helios_engine.engine.history import History
from helios_engine.engine.media import Clip
from helios_engine.request import FRAMES_PER_CHUNK, VideoRequest
from helios_engine.sampling.noise import NoiseSource, blend_with_noise


def load_pixels(request: VideoRequest) -> Tensor | Clip | None:
    """The request's picture as pixels [1, 3, 1, H, W], its clip, or None; files are read and checked here."""
    size = {"height": request.height, "width": request.width}
    if request.image is not None:
        return media.load_image(request.image, **size)
    return None if request.video is None else media.load_video(request.video, **size)


def start_history(
    request: VideoRequest,
    pixels: Tensor | Clip | None,
    noise: NoiseSource,
    codec: FrameCodec,
    *,
    channels: int,
    device: torch.device,
) -> History:
    """The history before the first chunk: empty, an image, or the end of a clip."""
    history = History.empty(channels, request.height // 8, request.width // 8, device)
    sigmas = {
        "image": (request.image_noise_sigma_min, request.image_noise_sigma_max),
        "video": (request.video_noise_sigma_min, request.video_noise_sigma_max),
    }
    if request.video is not None or request.video_latents is not None:
        anchor, clip = _clip_latents(request, pixels, noise, codec, device)
        anchor = blend_with_noise(anchor, noise, sigmas["image"], per_frame=False)
        pieces = clip.split(LATENT_FRAMES_PER_CHUNK, dim=2)
        clip = torch.cat([blend_with_noise(p, noise, sigmas["video"], per_frame=True) for p in pieces], dim=2)
        return history.after(clip, anchor)
    if request.image is not None or request.image_latents is not None:
        anchor, still = _image_latents(request, pixels, noise, codec, device)
        anchor = blend_with_noise(anchor, noise, sigmas["image"], per_frame=False)
        still = blend_with_noise(still, noise, sigmas["video"], per_frame=False)
        return history.after(still, anchor)
    return history


def _sample(codec: FrameCodec, pixels: Tensor, noise: NoiseSource) -> Tensor:
    """A draw from the encoder's distribution, as the reference does even at inference."""
    mean, std = codec.encode(pixels)
    return codec.normalize(mean + std * noise.normal(*mean.shape).to(mean.device))


def _image_latents(
    request: VideoRequest, pixels: Tensor | None, noise: NoiseSource, codec: FrameCodec, device: torch.device
) -> tuple[Tensor, Tensor]:
    if pixels is None:
        return tuple(x.to(device, torch.float32) for x in (request.image_latents, request.fake_image_latents))
    pixels = pixels.to(device)
    anchor = _sample(codec, pixels, noise)
    still = _sample(codec, pixels.expand(-1, -1, FRAMES_PER_CHUNK, -1, -1), noise)
    return anchor, still[:, :, -1:]


def _clip_latents(
    request: VideoRequest, clip: Clip | None, noise: NoiseSource, codec: FrameCodec, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Anchor and all pieces' latents; pieces too old for the history are zeros, but their random numbers are drawn."""
    if clip is None:
        latents = request.video_latents.to(device, torch.float32)
        anchor = latents[:, :, :1] if request.image_latents is None else request.image_latents.to(device, torch.float32)
        return anchor, latents
    anchor = _sample(codec, clip.first_BCTHW.to(device), noise)
    pieces = clip.tail_BCTHW.split(FRAMES_PER_CHUNK, dim=2)
    shape = (*anchor.shape[:2], LATENT_FRAMES_PER_CHUNK, *anchor.shape[3:])
    latents = []
    for _ in range(clip.num_frames // FRAMES_PER_CHUNK - len(pieces)):
        noise.normal(*shape)
        latents.append(torch.zeros(shape, device=device))
    latents += [_sample(codec, piece.to(device), noise) for piece in pieces]
    return anchor, torch.cat(latents, dim=2)
