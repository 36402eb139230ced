"""Pictures cut into horizontal slabs, one per rank: what the autoencoder's layers need from the neighbours.

# x [..., C at dimension 1, ..., rows, columns]: this rank's rows, on every level of the pyramid a multiple of its latent rows
A 3x3 convolution reads one row beyond the slab on either side, attention reads all rows; everything else is per pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_engine.ops import native as ops
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.layout import shares, starts


class Slab:
    """This rank's share of num_rows latent rows, from top to bottom in rank order. Every rank must have one at least."""

    def __init__(self, context: ContextParallel, num_rows: int) -> None:
        assert num_rows >= context.size, (num_rows, context.size)
        self._context = context
        self.counts = shares(num_rows, context.size)

    def own(self, x: Tensor, factor: int = 1) -> Tensor:
        """This rank's rows of a whole picture that has factor rows per latent row."""
        rank = self._context.rank
        return x.narrow(-2, starts(self.counts)[rank] * factor, self.counts[rank] * factor)

    def with_neighbours(self, x: Tensor) -> Tensor:
        """x with one more row above and one below: the neighbours', or zeros at the picture's edges."""
        above, below = self._exchange(x[..., :1, :], x[..., -1:, :])
        return torch.cat([above, x, below], dim=-2)

    def with_row_below(self, x: Tensor) -> Tensor:
        """x with one more row below."""
        _, below = self._exchange(x[..., :1, :], None)
        return torch.cat([x, below], dim=-2)

    def gather_tokens(self, tokens_BnC: Tensor, columns: int) -> Tensor:
        """All ranks' tokens of a latent-sized picture, row by row."""
        counts = [count * columns for count in self.counts]
        return self._context.gather_rows(tokens_BnC, counts, "vae", group="all")

    def gather_rows(self, x: Tensor) -> Tensor:
        """The whole latent-sized picture on every rank."""
        rows_first = x.movedim(-2, 0)
        flat = rows_first.reshape(1, rows_first.size(0), -1)
        whole = self._context.gather_rows(flat, self.counts, "vae", group="all")
        return whole.view(-1, *rows_first.shape[1:]).movedim(0, -2)

    def collect_frames(self, frames_FHWC: Tensor) -> Tensor | None:
        """Rank 0 gets whole frames from all ranks' rows, the others None."""
        counts = [count * 8 for count in self.counts]
        rows = self._context.collect_on_first(frames_FHWC.transpose(0, 1).contiguous(), counts, "frames")
        return None if rows is None else rows.transpose(0, 1).contiguous()

    def _exchange(self, first: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows above and below this slab. The first row goes up; the last one, where given, goes down."""
        rank, size = self._context.rank, self._context.size
        channels_last = first.movedim(1, -1)
        count = channels_last.numel()
        if size == 1:
            zeros = first.new_zeros(channels_last.shape).movedim(-1, 1)
            return zeros, zeros
        send_counts, receive_counts, pieces = [0] * size, [0] * size, []
        if rank > 0:
            send_counts[rank - 1] = count
            pieces.append(channels_last.reshape(-1))
            receive_counts[rank - 1] = 0 if last is None else count
        if rank + 1 < size:
            receive_counts[rank + 1] = count
            if last is not None:
                send_counts[rank + 1] = count
                pieces.append(last.movedim(1, -1).reshape(-1))
        received = self._context.all_to_all(
            torch.cat(pieces) if pieces else first.new_empty(0),
            send_counts=send_counts,
            receive_counts=receive_counts,
            purpose="vae",
            group="all",
        )
        parts = received.split(receive_counts)
        zeros = first.new_zeros(count)
        rows = (parts[peer] if 0 <= peer < size and receive_counts[peer] else zeros for peer in (rank - 1, rank + 1))
        above, below = (row.view(channels_last.shape).movedim(-1, 1) for row in rows)
        return above, below


def convolve_rows(conv: torch.nn.Conv2d, frames: Tensor, slab: Slab | None) -> tuple[Tensor, Tensor | None]:
    """A 3x3 convolution that keeps the size, over a whole picture or a slab of it, and the bias that it leaves open.

    cuDNN would add the bias in a pass of its own.
    """
    bias, left = (None, conv.bias) if ops.is_gpu(frames.device) else (conv.bias, None)
    if slab is None:
        return F.conv2d(frames, conv.weight, bias, padding=conv.padding), left
    return F.conv2d(slab.with_neighbours(frames), conv.weight, bias, padding=(0, 1)), left
