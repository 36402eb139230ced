"""What a video remembers of itself: the newest 19 latent frames and one anchor frame, whatever its length.

# B batch, C latent channels, T latent frames, H W latent rows and columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_engine.config import HISTORY_SIZES, NUM_HISTORY_FRAMES
from helios_engine.model.embed import HistoryWindow


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """frames_BCTHW holds exactly 19 frames, zeros before the video's start; anchor is None until the first chunk is done."""

    frames_BCTHW: Tensor
    anchor_BC1HW: Tensor | None = None

    @classmethod
    def empty(cls, channels: int, height: int, width: int, device: torch.device) -> History:
        return cls(torch.zeros(1, channels, NUM_HISTORY_FRAMES, height, width, device=device))

    def after(self, latents_BCTHW: Tensor, anchor_BC1HW: Tensor | None = None) -> History:
        """With newer frames and without as many old ones, float32; with another anchor where one is given."""
        frames = torch.cat([self.frames_BCTHW, latents_BCTHW.float()], dim=2)
        anchor = self.anchor_BC1HW if anchor_BC1HW is None else anchor_BC1HW
        return History(frames[:, :, -NUM_HISTORY_FRAMES:].contiguous(), anchor)

    def window(self) -> HistoryWindow:
        """The three groups the transformer reads: 16 oldest frames, 2 next, and the anchor with the newest."""
        long, mid, newest = self.frames_BCTHW.split(HISTORY_SIZES, dim=2)
        anchor = torch.zeros_like(newest) if self.anchor_BC1HW is None else self.anchor_BC1HW
        return HistoryWindow(long, mid, torch.cat([anchor.float(), newest], dim=2))


def stacked_window(histories: list[History]) -> HistoryWindow:
    """The windows of several videos as one batch."""
    windows = [history.window() for history in histories]
    return HistoryWindow(*(torch.cat([getattr(w, name) for w in windows]) for name in ("long", "mid", "short")))
