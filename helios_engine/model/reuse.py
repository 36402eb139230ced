"""What one step's forward leaves for the next: two approximations, off unless asked for.

# B batch, h history rows, n noisy rows, D width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Approximations:
    """history_refresh k: history rows go through the blocks in every k-th step of a stage, and their keys and values serve
    the steps between. block_cache: where the first blocks change the noisy rows by less than this share of what they did
    when last computed in full, the middle blocks' change is taken from then (DBCache in Cache-DiT's words)."""

    history_refresh: int = 1
    block_cache: float = 0.0

    @property
    def any(self) -> bool:
        return self.history_refresh > 1 or self.block_cache > 0


class Reuse:
    """One stage's memory; make a new one for each stage of each chunk. step counts its forwards."""

    def __init__(self, settings: Approximations, num_texts: int, num_blocks: int) -> None:
        self.settings = settings
        self.step = 0
        self.num_skipped = 0  # blocks left out so far, over all prompts
        self._kept: dict[tuple[int | None, int], Tensor] = {}  # (prompt, block) -> the history's keys and values
        self.middles = [Middle(settings.block_cache, num_blocks) for _ in range(num_texts)]

    @property
    def uses_history(self) -> bool:
        """Whether this forward does without history rows."""
        return self.step % self.settings.history_refresh != 0

    def end(self) -> None:
        self.step += 1
        self.num_skipped = sum(middle.num_skipped for middle in self.middles)

    def keys_values(self, text: int | None, block: int, kv_BLE: Tensor, num_history: int) -> Tensor:
        """Keys and values with the history's in front of the noisy rows', [B, h + n, 2 D].

        text is None in the first block, which all prompts share. A refreshing forward hands its own in to be kept; what a
        block that it left out had kept before stays.
        """
        if self.uses_history:
            return torch.cat([self._kept[text, block], kv_BLE], dim=1)
        self._kept[text, block] = kv_BLE[:, :num_history].clone()
        return kv_BLE


class Middle:
    """The middle blocks' joint change of the rows, for one prompt: begin <= index < end are what may be left out."""

    def __init__(self, threshold: float, num_blocks: int) -> None:
        self._threshold = threshold
        edge = max(1, num_blocks // 8)
        self.begin, self.end = edge, num_blocks - edge
        self.num_skipped = 0
        self._start: Tensor | None = None  # noisy rows before the first blocks
        self._before: Tensor | None = None  # all rows before the middle
        self._first_change: Tensor | None = None  # of the noisy rows by the first blocks, when last computed in full
        self._change: Tensor | None = None  # of the rows by the middle blocks, then

    @property
    def is_on(self) -> bool:
        return self._threshold > 0 and self.begin < self.end

    def enter(self, x_BLD: Tensor, num_history: int) -> None:
        """Before the first blocks."""
        self._start = x_BLD[:, num_history:].clone()

    def skips(self, x_BLD: Tensor, num_history: int, agree: Callable[[int], int]) -> bool:
        """At the middle: True after x got the middle's change from last time. agree makes all ranks decide alike."""
        change = x_BLD[:, num_history:] - self._start
        likely = 0
        if self._change is not None and self._change.size(1) >= x_BLD.size(1):
            last = self._first_change.float()
            distance = (change.float() - last).abs().mean() / last.abs().mean().clamp_min(_TINY)
            likely = int(distance.item() < self._threshold)
        if agree(likely):
            x_BLD += self._change[:, self._change.size(1) - x_BLD.size(1) :]
            self.num_skipped += self.end - self.begin
            return True
        self._first_change, self._before = change, x_BLD.clone()
        return False

    def leave(self, x_BLD: Tensor) -> None:
        """After the middle was computed."""
        self._change = x_BLD - self._before
        self._before = None
