"""From latents, timesteps and text to rows of the transformer's width.

# B batch, N tokens, D width, T text tokens; latents [B, C, T, H, W]
Source: Diffusers HeliosTransformer3DModel, HeliosTimeTextEmbedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_engine.config import ModelConfig
from helios_engine.model.cache import BoundedCache
from helios_engine.ops import native as ops

_TIMESTEPS_KEPT = 256  # 72 KB each for the 14 B model


@dataclass(frozen=True, slots=True)
class HistoryWindow:
    """What a chunk continues: clean latents [B, C, frames, H, W], oldest group first; a group may be absent.

    short is the anchor frame and the newest frame. mid and long need short: it sets the grid of their positions.
    """

    long: Tensor | None
    mid: Tensor | None
    short: Tensor | None

    def __post_init__(self) -> None:
        assert self.short is not None or (self.long is None and self.mid is None), "mid and long need short"


@dataclass(frozen=True, slots=True)
class TimeRows:
    """A timestep's embedding [D] and its six modulation rows [6, D], in the model's dtype; or several, [S, D] and [S, 6, D]."""

    embedding: Tensor
    rows: Tensor

    def at(self, index: Tensor) -> TimeRows:
        """One of several, by a number in device memory, int64 [1]."""
        return TimeRows(self.embedding.index_select(0, index)[0], self.rows.index_select(0, index)[0])

    def blank(self, count: int) -> TimeRows:
        """So many, of zeros."""
        return TimeRows(*(x.new_zeros(count, *x.shape[1:]) for x in (self.embedding, self.rows)))


class Embedder(nn.Module):
    """The layers before the first block. Patch convolutions are matrix products: their stride equals their kernel."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        dim, channels = config.dim, config.in_channels
        t, h, w = config.patch_size
        self.kernels = {
            "noisy": (t, h, w),
            "short": (t, h, w),
            "mid": (2 * t, 2 * h, 2 * w),
            "long": (4 * t, 4 * h, 4 * w),
        }
        self.patch = nn.ModuleDict(
            {name: nn.Linear(channels * math.prod(kernel), dim, dtype=dtype) for name, kernel in self.kernels.items()}
        )
        self.freq_dim = config.freq_dim
        self.time_in = nn.Linear(config.freq_dim, dim, dtype=torch.float32)
        self.time_out = nn.Linear(dim, dim, dtype=torch.float32)
        self.time_rows = nn.Linear(dim, 6 * dim, dtype=dtype)
        self.text_in = nn.Linear(config.text_dim, dim, dtype=dtype)
        self.text_out = nn.Linear(dim, dim, dtype=dtype)
        self._time_cache: BoundedCache[TimeRows] = BoundedCache(_TIMESTEPS_KEPT)

    def noisy(self, latents_BCTHW: Tensor, rows: slice = slice(None), *, after: Tensor | None = None) -> Tensor:
        """Tokens [B, n, D] of the chunk being denoised, or of some of its rows; behind a copy of other tokens, if given."""
        patches = self._patches("noisy", latents_BCTHW, rows)
        if after is None:
            return self.patch["noisy"](patches)
        tokens = self._buffer(patches, after.size(1) + patches.size(1))
        tokens[:, : after.size(1)] = after
        self._project_into(tokens[:, after.size(1) :], "noisy", patches)
        return tokens

    def history_patches(self, window: HistoryWindow) -> list[tuple[str, Tensor]]:
        """The history's patches by group, [long, mid, short], before any weight is applied."""
        groups = (("long", window.long), ("mid", window.mid), ("short", window.short))
        return [(name, self._patches(name, latents)) for name, latents in groups if latents is not None]

    def history(self, patches: list[tuple[str, Tensor]], rows: slice) -> Tensor:
        """Tokens [B, n, D] of some rows of the history, counted over all groups; every group lands in one buffer."""
        tokens = self._buffer(patches[0][1], max(0, rows.stop - rows.start))
        offset = 0
        for name, group in patches:
            start, stop = max(rows.start - offset, 0), min(rows.stop - offset, group.size(1))
            if stop > start:
                first = offset + start - rows.start
                self._project_into(tokens[:, first : first + stop - start], name, group[:, start:stop])
            offset += group.size(1)
        return tokens

    def _buffer(self, patches: Tensor, num_tokens: int) -> Tensor:
        return patches.new_empty(patches.size(0), num_tokens, self.text_out.out_features)

    def _patches(self, name: str, latents_BCTHW: Tensor, rows: slice = slice(None)) -> Tensor:
        dtype = self.patch[name].weight.dtype
        return ops.patch_rows(latents_BCTHW, self.kernels[name], dtype=dtype, rows=rows)

    def _project_into(self, tokens: Tensor, name: str, patches: Tensor) -> None:
        layer = self.patch[name]
        ops.linear(patches, layer.weight, layer.bias, out=tokens)

    def time(self, timestep: float) -> TimeRows:
        """The rows of a timestep, computed once: the time MLP reads 425 MB of weights in the 14 B model."""
        return self._time_cache.get(timestep, lambda: self._time(timestep))

    def times(self, timesteps: Sequence[float]) -> TimeRows:
        """The rows of several timesteps."""
        each = [self.time(timestep) for timestep in timesteps]
        return TimeRows(torch.stack([time.embedding for time in each]), torch.stack([time.rows for time in each]))

    def _time(self, timestep: float) -> TimeRows:
        half = self.freq_dim // 2
        device = self.time_in.weight.device
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = frequencies * timestep
        hidden = F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()])))
        embedding_D = self.time_out(hidden).to(self.time_rows.weight.dtype)
        return TimeRows(embedding_D, self.time_rows(F.silu(embedding_D)).unflatten(0, (6, -1)))

    def text(self, embeds_BTE: Tensor) -> Tensor:
        """Text tokens at the transformer's width [B, T, D]."""
        hidden = self.text_in(embeds_BTE.to(self.text_in.weight.dtype))
        return self.text_out(F.gelu(hidden, approximate="tanh"))

    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Checkpoint name -> the tensor to fill, viewed in the checkpoint's shape."""
        slots: dict[str, Tensor] = {}
        for name, kernel in self.kernels.items():
            prefix = "patch_embedding" if name == "noisy" else f"patch_{name}"
            weight = self.patch[name].weight.data
            slots[f"{prefix}.weight"] = weight.view(weight.size(0), -1, *kernel)
            slots[f"{prefix}.bias"] = self.patch[name].bias.data
        layers = {
            "time_embedder.linear_1": self.time_in,
            "time_embedder.linear_2": self.time_out,
            "time_proj": self.time_rows,
            "text_embedder.linear_1": self.text_in,
            "text_embedder.linear_2": self.text_out,
        }
        for name, layer in layers.items():
            slots[f"condition_embedder.{name}.weight"] = layer.weight.data
            slots[f"condition_embedder.{name}.bias"] = layer.bias.data
        return slots
