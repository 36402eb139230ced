"""A progress bar over solver steps, with chunks and frames per second; tqdm is imported when one is shown."""

from __future__ import annotations

import time

from torch import Tensor

from helios_engine.engine.plan import Plan
from helios_engine.request import FRAMES_PER_CHUNK, VideoChunk


class ProgressBar:
    """Give step to the engine as on_step and call chunk for every chunk."""

    def __init__(self, plan: Plan) -> None:
        from tqdm import tqdm

        total = None
        if plan.num_chunks is not None:
            total = sum(plan.steps_in_chunk(index) for index in range(min(plan.num_chunks, 2)))
            total += max(0, plan.num_chunks - 2) * plan.steps_in_chunk(1)
        self._num_chunks = plan.num_chunks
        self._bar = tqdm(total=total, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(self._text(0, None))
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
