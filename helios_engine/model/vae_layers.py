"""Layers of the Wan 2.1 video autoencoder, channels last.

# B batch, C channels, T frames, H W rows and columns
Attribute names are the checkpoint's. Source: Diffusers AutoencoderKLWan; Wan (arXiv 2503.20314).

Time is causal: every temporal convolution sees the two frames before its input, which FrameCache carries from call to
call. Sums are left open: on a GPU cuDNN adds a bias in a pass of its own, and a residual takes another one, so a
convolution's result travels with what is still to be added (Sum), and the norm or enlargement that reads it next adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_engine.model.slab import Slab, convolve_rows
from helios_engine.ops import native as ops

T = TypeVar("T")


@dataclass(slots=True)
class Sum:
    """Pictures x [B, C, T, H, W] that stand for x + (bias + residual)."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def whole(self) -> Tensor:
        """x with everything added, in place."""
        if self.bias is not None or self.residual is not None:
            ops.bias_residual(self.x, self.bias, self.residual)
            self.bias = self.residual = None
        return self.x

    def copied_to(self, out: Tensor) -> None:
        """The sum, written to pictures of x's shape."""
        ops.bias_residual(self.x, self.bias, self.residual, out=out)

    def normed(self, norm: RMSNorm, *, silu: bool = True, out: Tensor | None = None) -> Tensor:
        """The sum's norm. A residual is added to x for good on the way; a bias alone stays open."""
        result = ops.channel_norm_silu(self.x, norm.gamma, silu=silu, bias=self.bias, residual=self.residual, out=out)
        if self.residual is not None:
            self.bias = self.residual = None
        return result

    def plus(self, other: Sum) -> Sum:
        """This sum and another one, which must have no residual left. Two biases are added in the model's dtype."""
        assert self.residual is None, "a sum holds one residual"
        assert other.residual is None, "a sum holds one residual"
        biases = [bias for bias in (self.bias, other.bias) if bias is not None]
        return Sum(self.x, sum(biases[1:], biases[0]) if biases else None, other.x)


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

    def calls(self, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces of one chunk in order, the last one announced."""
        pieces = list(pieces)
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

    def forward(self, inputs: Sum, cache: FrameCache) -> Sum:
        if cache.slab is not None and self.padding[1]:
            return self._of_slab(inputs.whole(), cache)
        if not self.num_past:
            return self._convolve(inputs.whole(), self.padding)
        buffer = self._with_past(inputs.x, cache)
        inputs.copied_to(buffer[:, :, self.num_past :])
        return self._of_buffer(buffer, cache)

    def normed(self, inputs: Sum, norm: RMSNorm, cache: FrameCache) -> Tensor:
        """silu(norm(inputs)) as of_normed takes it: written straight behind the past frames the convolution needs."""
        if cache.slab is not None:
            return inputs.normed(norm)
        buffer = self._with_past(inputs.x, cache)
        inputs.normed(norm, out=buffer[:, :, self.num_past :])
        return buffer

    def of_normed(self, normed: Tensor, cache: FrameCache) -> Sum:
        """The convolution of what normed made."""
        return self._of_buffer(normed, cache) if cache.slab is None else self._of_slab(normed, cache)

    def _with_past(self, x: Tensor, cache: FrameCache) -> Tensor:
        """Pictures like x with the past frames in front; the others are yet to be written."""
        batch, channels, frames, height, width = x.shape
        buffer = x.new_empty(batch, self.num_past + frames, height, width, channels).permute(0, 4, 1, 2, 3)
        past = cache.pop(self, None)
        if past is None:
            buffer[:, :, : self.num_past].zero_()
        else:
            buffer[:, :, : self.num_past].copy_(past)
        return buffer

    def _of_buffer(self, buffer: Tensor, cache: FrameCache) -> Sum:
        cache.keep(self, buffer, self.num_past)
        return self._convolve(buffer, self.padding)

    def _of_slab(self, x: Tensor, cache: FrameCache) -> Sum:
        x = cache.slab.with_neighbours(x)
        if self.num_past:
            buffer = self._with_past(x, cache)
            buffer[:, :, self.num_past :].copy_(x)
            x = buffer
            cache.keep(self, x, self.num_past)
        return self._convolve(x, (0, 0, self.padding[2]))

    def _convolve(self, x: Tensor, padding: tuple[int, ...]) -> Sum:
        if ops.is_gpu(x.device):
            return Sum(F.conv3d(x, self.weight, None, self.stride, padding), self.bias)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # Left to itself torch takes a plain loop for small inputs: 5.9 s against 0.7 s for a toy chunk, 2 cores.
            return Sum(torch.mkldnn_convolution(x, self.weight, self.bias, padding, self.stride, self.dilation, 1))
        return Sum(F.conv3d(x, self.weight, self.bias, self.stride, padding))


class RMSNorm(nn.Module):
    """The norm's gamma in the checkpoint's broadcast shape; see Sum.normed."""

    def __init__(self, channels: int, trailing_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *[1] * trailing_dims))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_channels, 3)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = RMSNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, inputs: Sum, cache: FrameCache) -> Sum:
        hidden = self.conv1.of_normed(self.conv1.normed(inputs, self.norm1, cache), cache)
        normed = self.conv2.normed(hidden, self.norm2, cache)
        del hidden  # as large as what comes
        shortcut = inputs if self.conv_shortcut is None else self.conv_shortcut(inputs, cache)
        return self.conv2.of_normed(normed, cache).plus(shortcut)


def _frames_as_batch(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _batch_as_frames(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        # Convolutions of one pixel in the checkpoint; computed as linear layers of tokens, which take their bias along.
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, inputs: Sum, slab: Slab | None) -> Sum:
        x = inputs.whole() if inputs.residual is None else inputs.x  # a residual joins the norm
        frames = _frames_as_batch(inputs.normed(self.norm, silu=False))
        height, width = frames.shape[-2:]
        tokens = frames.permute(0, 2, 3, 1).flatten(1, 2)
        q, kv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).tensor_split([x.size(1)], dim=-1)
        if slab is not None:
            kv = slab.gather_tokens(kv, width)
        k, v = kv.unsqueeze(1).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(q.unsqueeze(1), k, v).squeeze(1)
        out = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        pictures = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return Sum(_batch_as_frames(pictures, x.size(0))).plus(Sum(x))


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, inputs: Sum, cache: FrameCache) -> Sum:
        return self.resnets[1](self.attentions[0](self.resnets[0](inputs, cache), cache.slab), cache)


class Upsample(nn.Module):
    """Twice the rows and columns, halving the channels; with in_time, twice the frames but for the first one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        # Index 1 holds the convolution in the checkpoint; index 0 is the parameter-free enlargement.
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if in_time else None

    def forward(self, inputs: Sum, cache: FrameCache) -> Sum:
        if self.time_conv is not None and self in cache:
            enlarged = self._in_time(inputs, cache)
        else:
            if self.time_conv is not None:  # the first frame stays single; the next call starts from zeros, not from it
                cache[self] = inputs.x.new_empty(0)
            enlarged = ops.upsample_nearest(inputs.x, bias=inputs.bias, residual=inputs.residual)
        inputs.residual = None  # nobody else reads it
        out, bias = convolve_rows(self.resample["1"], _frames_as_batch(enlarged), cache.slab)
        return Sum(_batch_as_frames(out, enlarged.size(0)), bias)

    def _in_time(self, inputs: Sum, cache: FrameCache) -> Tensor:
        """The temporal convolution's two halves of channels as frames in turn, each pixel over 2 x 2."""
        halves = self.time_conv(inputs, cache)
        batch, channels, frames, height, width = inputs.x.shape
        out = inputs.x.new_empty(batch, 2 * frames, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)
        for half in range(2):
            part = slice(half * channels, (half + 1) * channels)
            bias = None if halves.bias is None else halves.bias[part]
            ops.upsample_nearest(halves.x[:, part], bias=bias, out=out[:, :, half::2])
        return out


class Downsample(nn.Module):
    """Half the rows and columns; with in_time, half the frames but for the first one."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, inputs: Sum, cache: FrameCache) -> Sum:
        frames = _frames_as_batch(inputs.whole())
        frames = F.pad(frames, (0, 1, 0, 1)) if cache.slab is None else F.pad(cache.slab.with_row_below(frames), (0, 1))
        x = _batch_as_frames(self.resample["1"](frames), inputs.x.size(0))
        if self.time_conv is not None:
            past = cache.pop(self, None)
            cache.keep(self, x, 1)
            if past is not None:
                x = self.time_conv(torch.cat([past, x], dim=2))
        return Sum(x)
