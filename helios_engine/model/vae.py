"""The Wan 2.1 video autoencoder, channels last, in as few calls as memory allows.

# B batch, C channels, T frames, H W rows and columns; pixels in [-1, 1], 1 + 4 n frames for 1 + n latent frames
Attribute names are the checkpoint's. Source: Diffusers AutoencoderKLWan; Wan (arXiv 2503.20314).

Time is causal: every temporal convolution sees the two frames before its input, which FrameCache carries from call to
call. The reference decodes nine latent frames in nine calls. The layers only tell the first frame from the rest, so one
call for the first and one for the other eight compute the same function.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_engine.config import VaeConfig
from helios_engine.model.slab import Slab, convolve_rows
from helios_engine.ops import native as ops


class FrameCache(dict[nn.Module, Tensor]):
    """The frames each temporal layer saw last; slab says which rows this rank holds, None for all.

    Entries go when they are read, so that old and new ones are not there together, and none are left by the last call.
    """

    def __init__(self, slab: Slab | None = None) -> None:
        super().__init__()
        self.slab = slab
        self.is_last_call = False

    def keep(self, layer: nn.Module, x: Tensor, num_frames: int) -> None:
        """Remember the newest frames of x [B, C, T, H, W] for the layer's next call."""
        if not self.is_last_call:
            self[layer] = x[:, :, -num_frames:].clone()

    def calls(self, pieces: list[Tensor]) -> Iterator[Tensor]:
        """The pieces of one chunk in order, the last one announced."""
        for place, piece in enumerate(pieces):
            self.is_last_call = place == len(pieces) - 1
            yield piece


class CausalConv3d(nn.Conv3d):
    """A convolution whose temporal window ends at the current frame."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int], stride: int = 1
    ) -> None:
        size = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, size[1] // 2, size[2] // 2)
        super().__init__(in_channels, out_channels, size, stride=(stride, 1, 1), padding=padding)
        self.num_past = size[0] - 1

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        return self._causal(x, cache, self.bias)

    def _causal(self, x: Tensor, cache: FrameCache, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if cache.slab is not None and padding[1]:
            x, padding = cache.slab.with_neighbours(x), (0, 0, padding[2])
        if self.num_past:
            past = cache.pop(self, None)
            if past is None:
                past = x.new_zeros(*x.shape[:2], self.num_past, *x.shape[3:])
                if not x.is_contiguous():  # cat takes its layout from its first part
                    past = past.contiguous(memory_format=torch.channels_last_3d)
            x = torch.cat([past, x], dim=2)
            del past
            cache.keep(self, x, self.num_past)
        return self._convolve(x, padding, bias)

    def _convolve(self, x: Tensor, padding: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # Left to itself torch takes a plain loop for small inputs: 5.9 s against 0.7 s for a toy chunk, 2 cores.
            return torch.mkldnn_convolution(x, self.weight, bias, padding, self.stride, self.dilation, 1)
        return F.conv3d(x, self.weight, bias, self.stride, padding)

    def normed(self, x: Tensor, norm: RMSNorm, cache: FrameCache) -> Tensor:
        """silu(norm(x)) as of_normed takes it: written straight behind the past frames the convolution needs."""
        if cache.slab is not None or not self.num_past:
            return ops.channel_norm_silu(x, norm.gamma)
        batch, channels, frames, height, width = x.shape
        whole = x.new_empty(batch, self.num_past + frames, height, width, channels).permute(0, 4, 1, 2, 3)
        past = cache.pop(self, None)
        whole[:, :, : self.num_past] = 0 if past is None else past
        del past  # before its successor is made
        ops.channel_norm_silu(x, norm.gamma, out=whole[:, :, self.num_past :])
        cache.keep(self, whole, self.num_past)
        return whole

    def of_normed(self, normed: Tensor, cache: FrameCache, residual: Tensor | None = None) -> Tensor:
        """The convolution of what normed made, plus a residual."""
        # cuDNN leaves the bias to a pass of its own, so it goes with the residual.
        joins_bias = residual is not None and normed.device.type == "cuda"
        bias = None if joins_bias else self.bias
        if cache.slab is not None or not self.num_past:
            out = self._causal(normed, cache, bias)
        else:
            out = self._convolve(normed, self.padding, bias)
        if joins_bias:
            ops.bias_residual_(out, self.bias, residual)
            return out
        return out if residual is None else out.add_(residual)


class RMSNorm(nn.Module):
    """Norm over channels, see ops.channel_norm_silu; gamma keeps the checkpoint's broadcast shape."""

    def __init__(self, channels: int, trailing_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *[1] * trailing_dims))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The norm of pictures [N, C, H, W], without an activation."""
        return ops.channel_norm_silu(x_NCHW.unsqueeze(2), self.gamma, silu=False).squeeze(2)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, 3)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = RMSNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, cache)
        hidden = self.conv1.of_normed(self.conv1.normed(x, self.norm1, cache), cache)
        normed = self.conv2.normed(hidden, self.norm2, cache)
        del hidden  # as large as what comes
        return self.conv2.of_normed(normed, cache, shortcut)


def _frames_as_batch(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, slab: Slab | None) -> Tensor:
        frames = _frames_as_batch(x)
        height, width = frames.shape[-2:]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()
        q, kv = qkv.tensor_split([x.size(1)], dim=-1)
        if slab is not None:
            kv = slab.gather_tokens(kv, width)
        k, v = kv.unsqueeze(1).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(q.unsqueeze(1), k, v).squeeze(1).transpose(1, 2)
        return x + _batch_as_frames(self.proj(attended.unflatten(2, (height, width))), x.size(0))


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache), cache.slab), cache)


class Upsample(nn.Module):
    """Twice the rows and columns, halving the channels; with in_time, twice the frames but for the first one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        # Index 1 holds the convolution in the checkpoint; index 0 is the parameter-free enlargement.
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        batch = x.size(0)
        if self.time_conv is not None:
            if self in cache:
                halves = self.time_conv(x, cache).unflatten(1, (2, -1))
                x = halves.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            else:  # the video's first frame stays single, and the next call starts from zeros, not from it
                cache[self] = x.new_empty(0)
        frames = _frames_as_batch(ops.upsample_nearest(x))
        return _batch_as_frames(convolve_rows(self.resample["1"], frames, cache.slab), batch)


class Downsample(nn.Module):
    """Half the rows and columns; with in_time, half the frames but for the first one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        frames = _frames_as_batch(x)
        frames = F.pad(frames, (0, 1, 0, 1)) if cache.slab is None else F.pad(cache.slab.with_row_below(frames), (0, 1))
        x = _batch_as_frames(self.resample["1"](frames), x.size(0))
        if self.time_conv is not None:
            past = cache.pop(self, None)
            cache.keep(self, x, 1)
            if past is not None:
                x = self.time_conv(torch.cat([past, x], dim=2))
        return x


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

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.conv_in(x, cache)
        for layer in self.down_blocks:
            x = layer(x, cache)
        x = self.mid_block(x, cache)
        return self.conv_out.of_normed(self.conv_out.normed(x, self.norm_out, cache), cache)


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_resnets: int, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * num_resnets]
        self.resnets = nn.ModuleList([ResidualBlock(a, b) for a, b in itertools.pairwise(widths)])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, cache)
        return x if self.upsamplers is None else self.upsamplers[0](x, cache)


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

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out.of_normed(self.conv_out.normed(x, self.norm_out, cache), cache)


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
        parts = [self.encoder(piece, cache) for piece in cache.calls(pieces)]
        moments = self.quant_conv(torch.cat(parts, dim=2), cache).float()
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
        hidden = self.post_quant_conv(latents, cache)
        rest = hidden.size(2) - 1
        size = rest if frames_per_call is None else min(frames_per_call, rest)
        pieces = [hidden[:, :, :1], *(hidden[:, :, 1:].split(size, dim=2) if rest else ())]
        pixels = torch.cat([self.decoder(piece, cache) for piece in cache.calls(pieces)], dim=2)
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


def to_unit_range(pixels: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (pixels * 0.5 + 0.5).clamp_(0.0, 1.0)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to whole numbers 0 to 255, rounded to nearest."""
    return to_unit_range(pixels.float()).mul_(255.0).round_().to(torch.uint8)
