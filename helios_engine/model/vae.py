"""The Wan 2.1 video autoencoder, channels last, in as few calls as memory allows.

# B batch, C channels, T frames, H W rows and columns; pixels in [-1, 1], 1 + 4 n frames for 1 + n latent frames
Attribute names are the checkpoint's. Source: Diffusers AutoencoderKLWan; Wan (arXiv 2503.20314).

The reference decodes nine latent frames in nine calls. The layers only tell the first frame from the rest, so one call for
the first and one for the other eight compute the same function; vae_layers.py has the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from helios_engine.config import VaeConfig
from helios_engine.model.slab import Slab
from helios_engine.model.vae_layers import (
    CausalConv3d,
    Downsample,
    FrameCache,
    MidBlock,
    ResidualBlock,
    RMSNorm,
    Sum,
    Upsample,
)


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, channels[0], 3)
        layers: list[nn.Module] = []
        for level, (current, following) in enumerate(itertools.pairwise(channels)):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(current, following))
                current = following
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(following, config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(channels[-1])
        self.norm_out = RMSNorm(channels[-1], 3)
        self.conv_out = CausalConv3d(channels[-1], config.z_dim * 2, 3)

    def forward(self, pixels: Tensor, cache: FrameCache) -> Sum:
        hidden = self.conv_in(Sum(pixels), cache)
        for layer in self.down_blocks:
            hidden = layer(hidden, cache)
        hidden = self.mid_block(hidden, cache)
        return self.conv_out.of_normed(self.conv_out.normed(hidden, self.norm_out, cache), cache)


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_resnets]
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in itertools.pairwise(widths)])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, hidden: Sum, cache: FrameCache) -> Sum:
        for resnet in self.resnets:
            hidden = resnet(hidden, cache)
        return hidden if self.upsamplers is None else self.upsamplers[0](hidden, cache)


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        channels = [base * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
        in_time = tuple(reversed(config.temperal_downsample))
        self.conv_in = CausalConv3d(config.z_dim, channels[0], 3)
        self.mid_block = MidBlock(channels[0])
        blocks = []
        for level, (current, following) in enumerate(itertools.pairwise(channels)):
            is_last = level == len(config.dim_mult) - 1
            upsample = None if is_last else Upsample(following, in_time[level])
            # Each enlargement before this block halved the channels.
            blocks.append(UpBlock(current // 2 if level else current, following, config.num_res_blocks + 1, upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(channels[-1], 3)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels, 3)

    def forward(self, hidden: Sum, cache: FrameCache) -> Sum:
        hidden = self.mid_block(self.conv_in(hidden, cache), cache)
        for block in self.up_blocks:
            hidden = block(hidden, cache)
        return self.conv_out.of_normed(self.conv_out.normed(hidden, self.norm_out, cache), cache)


class VideoAutoencoder(nn.Module):
    """Encode and decode one chunk at a time; chunks share nothing, as the model was trained."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        statistics = torch.tensor([config.latents_mean, config.latents_std], dtype=torch.float32)
        self.register_buffer("statistics", statistics.view(2, 1, -1, 1, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def channels_last_(self) -> VideoAutoencoder:
        """Store convolution weights channels last; activations follow. Call once after the weights are in place."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
            elif isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
        return self

    def encode(
        self, pixels_BCTHW: Tensor, *, frames_per_call: int | None = None, slab: Slab | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents [B, z, 1 + T/4, H/8, W/8], not yet normalised, float32.

        The first frame is a call of its own, the others come 4 * frames_per_call at a time (None: all at once). With a
        slab every rank encodes its own rows of the same pixels, and all get the whole result.
        """
        if slab is not None:
            pixels_BCTHW = slab.own(pixels_BCTHW, 8)
        pixels = pixels_BCTHW.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        cache = FrameCache(slab)
        rest = pixels.size(2) - 1
        size = rest if frames_per_call is None else min(4 * frames_per_call, rest)
        pieces = [pixels[:, :, :1], *(pixels[:, :, 1:].split(size, dim=2) if rest else ())]
        parts = [self.encoder(piece, cache).whole() for piece in cache.calls(pieces)]
        moments = self.quant_conv(Sum(torch.cat(parts, dim=2)), cache).whole().float()
        self._check_range(moments)
        mean, log_variance = (moments if slab is None else slab.gather_rows(moments)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def decode(self, latents_BCTHW: Tensor, *, frames_per_call: int | None = None, slab: Slab | None = None) -> Tensor:
        """Pixels [B, 3, 1 + 4 (T - 1), 8 H, 8 W] in [-1, 1] of normalised latents.

        The first latent frame is a call of its own, the others come frames_per_call at a time (None: all at once). With
        a slab every rank decodes its own rows of the same latents and returns those rows of pixels.
        """
        if slab is not None:
            latents_BCTHW = slab.own(latents_BCTHW)
        latents = self.denormalize(latents_BCTHW).to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        cache = FrameCache(slab)
        hidden = self.post_quant_conv(Sum(latents), cache)
        batch, _, num_latents, height, width = latents.shape
        in_time = 2 ** sum(self.config.temperal_downsample)
        in_space = 2 ** (len(self.config.dim_mult) - 1)
        size = (1 + in_time * (num_latents - 1), in_space * height, in_space * width)
        pixels = latents.new_empty(batch, *size, self.config.out_channels).permute(0, 4, 1, 2, 3)
        start = 0
        for piece in cache.calls(_pieces(hidden, frames_per_call)):
            part = self.decoder(piece, cache)
            end = start + part.x.size(2)
            part.copied_to(pixels[:, :, start:end])
            start = end
        self._check_range(pixels)
        return pixels.clamp_(-1.0, 1.0)

    def _check_range(self, values: Tensor) -> None:
        """In float16, refuse what went past 65504: infinities become NaN at the next norm and reach the end."""
        if self.dtype == torch.float16 and not bool(values.isfinite().all()):
            raise OverflowError(
                "the VAE's activations exceed float16's range (65504) on this video; use vae dtype bfloat16 or float32"
            )

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents as the transformer sees them: per channel (x - mean) / std."""
        mean, std = self.statistics.unbind(0)
        return (latents - mean) * (1.0 / std)

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics.unbind(0)
        return latents.float() / (1.0 / std) + mean

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return {name: tensor.data for name, tensor in self.state_dict(keep_vars=True).items()}


def _pieces(hidden: Sum, frames_per_call: int | None) -> Iterator[Sum]:
    """The first frame, then the others, so many at a time."""
    rest = hidden.x.size(2) - 1
    yield Sum(hidden.x[:, :, :1], hidden.bias)
    for piece in hidden.x[:, :, 1:].split(min(frames_per_call or rest, rest), dim=2) if rest else ():
        yield Sum(piece, hidden.bias)


def to_unit_range(pixels: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (pixels * 0.5 + 0.5).clamp_(0.0, 1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to whole numbers 0 to 255, rounded to nearest."""
    return to_unit_range(pixels.float()).mul_(255.0).round_().to(torch.uint8)
