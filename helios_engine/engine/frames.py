"""Latents to frames a caller can use (decode, convert on the device, hand over), and pictures to latents.

# latents [1, C, 9, h, w]; frames [F, H, W, 3]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from helios_engine.model.slab import Slab
from helios_engine.model.vae import VideoAutoencoder, to_uint8, to_unit_range
from helios_engine.ops import native as ops
from helios_engine.parallel.context import ContextParallel
from helios_engine.request import FRAMES_PER_CHUNK
from helios_engine.trace import span

_SPLITS = (8, 4, 2, 1)
# Tensors alive at a decoder call's peak, in units of one full-resolution activation of one latent frame (four frames, base
# width), counted in decodes with 1 to 8 frames a call: per frame of the call, with the compiled operators and with plain
# torch by element size; and whatever the call. cuDNN's workspace comes on top.
_UNITS_PER_FRAME = 4
_SHARDED_UNITS_PER_FRAME = 6  # rows with their neighbours' are copies
_PLAIN_UNITS_PER_FRAME = {4: 6, 2: 9}
_UNITS_FIXED = 7
# Two frames a call keep the CPU's temporaries small: 6.0 s against 7.4 s for eight (base_dim 32, 128x192, 2 cores).
_CPU_FRAMES_PER_CALL = 2


class FrameCodec:
    """Decodes chunks and encodes pictures, on all ranks together where that pays, and keeps nothing between calls."""

    def __init__(
        self,
        vae: VideoAutoencoder,
        context: ContextParallel,
        *,
        shard: bool,
        counts_idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """counts_idle says whether what torch's allocator holds ready is the decoder's to use: not where that is kept for
        another stream or for recorded forwards."""
        self._vae, self._context, self._shard = vae, context, shard
        self._counts_idle = counts_idle
        self._splits: dict[tuple[object, ...], int] = {}

    def decode(self, latents: Tensor, kind: str, num_frames: int) -> Tensor | None:
        """The first num_frames frames of a chunk, of the kind VideoRequest.frames names, on rank 0; None elsewhere.

        Those of a host kind are there when the device has done what is enqueued.
        """
        slab = self._slab(latents.size(-2))
        if slab is None and not self._context.is_first:
            return None
        with span("vae"):
            size = tuple(latents.shape[-2:])
            if slab is None:
                split = self._frames_per_call(latents.device, size)
            else:
                split = self._common_frames_per_call(latents.device, size, slab)
            pixels = self._vae.decode(latents, frames_per_call=split, slab=slab)[0, :, :num_frames]
            if kind == "float32":
                frames = to_unit_range(pixels.float())
            else:
                frames = to_uint8(pixels)
            frames = frames.permute(1, 2, 3, 0).contiguous()
            if slab is not None:
                frames = slab.collect_frames(frames)
            return frames if frames is None or kind == "device" else _on_its_way(frames)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents [1, C, T, h, w], not normalised, on every rank."""
        latent_size = (pixels.size(-2) // 8, pixels.size(-1) // 8)
        slab = self._slab(latent_size[0])
        split = self._common_frames_per_call(pixels.device, latent_size, slab)
        try:
            return self._vae.encode(pixels, frames_per_call=split, slab=slab)
        except torch.OutOfMemoryError:
            self.forget_splits()
            raise

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as the transformer sees them."""
        return self._vae.normalize(latents)

    def _slab(self, num_rows: int) -> Slab | None:
        """Rows are shared where there is one for every rank at least."""
        shares_rows = self._shard and 1 < self._context.size <= num_rows
        return Slab(self._context, num_rows) if shares_rows else None

    def _common_frames_per_call(self, device: torch.device, latent_size: tuple[int, int], slab: Slab | None) -> int:
        """What the rank with the least free memory can take: neighbours talk in every call, and all must round alike."""
        rows = latent_size[0] if slab is None else max(slab.counts)
        split = self._frames_per_call(device, (rows, latent_size[1]), sharded=slab is not None)
        return split if device.type == "cpu" else min(n for (n,) in self._context.gather_numbers([split]))

    def _frames_per_call(self, device: torch.device, latent_size: tuple[int, int], *, sharded: bool = False) -> int:
        counts_idle = self._counts_idle()
        key = (latent_size, sharded, counts_idle)
        # What the decoder itself holds ready cannot be told from what others do, so then the first answer stays.
        if counts_idle or key not in self._splits:
            self._splits[key] = frames_per_call_for(
                device, self._vae, latent_size, counts_idle=counts_idle, sharded=sharded
            )
        return self._splits[key]

    def forget_splits(self) -> None:
        """Ask the device's memory again: it was not enough. What torch holds ready counts as free then."""
        self._splits.clear()
        torch.cuda.empty_cache()


def _on_its_way(frames: Tensor) -> Tensor:
    """Frames on the host, once the device has copied them."""
    if frames.device.type == "cpu":
        return frames
    return torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True).copy_(frames, non_blocking=True)


def handed_over(frames: Tensor | None, kind: str) -> np.ndarray | Tensor | None:
    """Decoded frames as a caller gets them."""
    return frames if frames is None or kind == "device" else frames.numpy()


def decode_bytes(
    device: torch.device,
    vae: VideoAutoencoder,
    latent_size: tuple[int, int],
    num_latent_frames: int,
    *,
    sharded: bool = False,
) -> int:
    """Peak of one decoder call in bytes, set by its last level; an encoder call of as many frames needs no more."""
    channels = vae.config.decoder_base_dim or vae.config.base_dim
    size = vae.dtype.itemsize
    unit = channels * latent_size[0] * latent_size[1] * 64 * 4 * size
    per_frame = _SHARDED_UNITS_PER_FRAME if sharded else _UNITS_PER_FRAME
    if not ops.serves(device):
        per_frame = max(per_frame, _PLAIN_UNITS_PER_FRAME[size])
    pixels = (
        FRAMES_PER_CHUNK * vae.config.out_channels * latent_size[0] * latent_size[1] * 64 * size
    )  # all of the chunk's
    return int(unit * (per_frame * num_latent_frames + _UNITS_FIXED)) + pixels


def frames_per_call_for(
    device: torch.device,
    vae: VideoAutoencoder,
    latent_size: tuple[int, int],
    *,
    counts_idle: bool = True,
    sharded: bool = False,
) -> int:
    """How many latent frames after the first to decode at once: on a GPU as many as fit its free memory.

    counts_idle takes what torch's allocator holds ready for free too.
    """
    if device.type == "cpu":
        return _CPU_FRAMES_PER_CALL
    free, _ = torch.cuda.mem_get_info(device)
    if counts_idle:
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return next(
        (split for split in _SPLITS if decode_bytes(device, vae, latent_size, split, sharded=sharded) < 0.9 * free), 1
    )
