"""Rotary position tables over (time, row, column), complex64: cos + i sin, [L, K/2].

They depend on shapes alone: frame indices restart with every chunk, so a table lives as long as the engine.
Source: Diffusers HeliosRotaryPosEmbed and HeliosTransformer3DModel.forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.config import HISTORY_SIZES, LATENT_FRAMES_PER_CHUNK, ModelConfig

# One anchor frame, long, mid, newest, then the chunk: indices never depend on the chunk's number.
_LONG_START = 1
_MID_START = _LONG_START + HISTORY_SIZES[0]
_NEWEST = _MID_START + HISTORY_SIZES[1]
_CHUNK_START = _NEWEST + HISTORY_SIZES[2]

LONG_FRAMES = tuple(range(_LONG_START, _MID_START))
MID_FRAMES = tuple(range(_MID_START, _NEWEST))
SHORT_FRAMES = (0, *range(_NEWEST, _CHUNK_START))
CHUNK_FRAMES = tuple(range(_CHUNK_START, _CHUNK_START + LATENT_FRAMES_PER_CHUNK))


def _frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def grid_table(config: ModelConfig, frames: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Table [K/2, T, rows, columns] for every cell of a patch grid; float32 angles, made on the CPU."""
    axes = (torch.tensor(frames, dtype=torch.float32), torch.arange(rows).float(), torch.arange(columns).float())
    shape = (len(frames), rows, columns)
    parts = []
    for axis, (dim, positions) in enumerate(zip(config.rope_dim, axes, strict=True)):
        angles = torch.outer(_frequencies(dim, config.rope_theta), positions)
        view = [angles.size(0), 1, 1, 1]
        view[axis + 1] = positions.numel()
        parts.append(angles.view(view).expand(-1, *shape))
    angles = torch.cat(parts)
    return torch.complex(angles.cos(), angles.sin())


def _averaged(table: Tensor, kernel: int) -> Tensor:
    """Mean of cos and of sin over kernel^3 cells, edges repeated; the mean is not renormalised, as in the reference."""
    pad = [(-size) % kernel for size in table.shape[1:]]
    planes = torch.view_as_real(table).permute(4, 0, 1, 2, 3)
    planes = F.pad(planes, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")
    planes = F.avg_pool3d(planes, kernel, stride=kernel)
    return torch.complex(planes[0], planes[1])


def _as_rows(table: Tensor) -> Tensor:
    return table.flatten(1).transpose(0, 1).contiguous()


def chunk_table(config: ModelConfig, rows: int, columns: int) -> Tensor:
    """Table [9 * rows * columns, K/2] of the noisy tokens of one pyramid stage."""
    return _as_rows(grid_table(config, CHUNK_FRAMES, rows, columns))


def history_table(
    config: ModelConfig, rows: int, columns: int, *, long: bool = True, mid: bool = True, short: bool = True
) -> Tensor:
    """Table [L, K/2] of the history tokens, [long | mid | short]; rows x columns is the patch grid at full resolution."""
    parts = []
    if long:
        parts.append(_as_rows(_averaged(grid_table(config, LONG_FRAMES, rows, columns), 4)))
    if mid:
        parts.append(_as_rows(_averaged(grid_table(config, MID_FRAMES, rows, columns), 2)))
    if short:
        parts.append(_as_rows(grid_table(config, SHORT_FRAMES, rows, columns)))
    return torch.cat(parts) if parts else torch.empty(0, config.attention_head_dim // 2, dtype=torch.complex64)
