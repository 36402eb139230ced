"""A progress bar over solver steps, with chunks and frames per second; tqdm is imported when one is shown."""

from __future__ import annotations

import time

from torch import Tensor

from helios_engine.engine.plan import Plan
from helios_engine.request import FRAMES_PER_CHUNK, VideoChunk


class ProgressBar:
    """Give step to the engine as on_step and call chunk for every chunk."""

    def __init__(self, plan: Plan, *, first_chunk: int = 0) -> None:
        from tqdm import tqdm

        total = None if plan.num_chunks is None else _steps_before(plan, plan.num_chunks)
        self._num_chunks = plan.num_chunks
        self._bar = tqdm(total=total, initial=_steps_before(plan, first_chunk), unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(self._text(first_chunk, None))
        self._last = time.perf_counter()

    def step(self, stage: int, step: int, latents: Tensor) -> None:
        self._bar.update()

    def chunk(self, chunk: VideoChunk) -> None:
        now = time.perf_counter()
        rate = FRAMES_PER_CHUNK / (now - self._last)
        self._last = now
        self._bar.set_postfix_str(self._text(chunk.index + 1, rate))

    def close(self) -> None:
        self._bar.close()

    def _text(self, done: int, rate: float | None) -> str:
        total = "endless" if self._num_chunks is None else str(self._num_chunks)
        speed = "" if rate is None else f", {rate:.2f} frames/s"
        return f"chunk {done}/{total}{speed}"


def _steps_before(plan: Plan, index: int) -> int:
    """Solver steps of all chunks before the index-th; the first chunk may have more."""
    return 0 if index == 0 else plan.steps_in_chunk(0) + (index - 1) * plan.steps_in_chunk(1)
