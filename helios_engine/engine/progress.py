"""A progress bar over solver steps, with chunks and frames per second; nothing where tqdm is missing."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from helios_engine.engine.plan import Plan
from helios_engine.request import FRAMES_PER_CHUNK, VideoChunk

logger = logging.getLogger(__name__)


class ProgressBar:
    """Give step to the engine as on_step and call chunk for every chunk."""

    def __init__(self, plan: Plan, *, first_chunk: int = 0) -> None:
        self._bar, self._num_chunks = None, plan.num_chunks
        try:
            from tqdm import tqdm
        except ImportError as error:
            logger.warning("no progress bar: %s; pip install tqdm", error)
            return
        total = None if plan.num_chunks is None else _steps_before(plan, plan.num_chunks)
        self._bar = tqdm(total=total, initial=_steps_before(plan, first_chunk), unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(self._text(first_chunk, None))
        self._last = time.perf_counter()

    def step(self, stage: int, step: int, latents: Tensor) -> None:
        if self._bar is not None:
            self._bar.update()

    def chunk(self, chunk: VideoChunk) -> None:
        if self._bar is None:
            return
        now = time.perf_counter()
        rate = FRAMES_PER_CHUNK / (now - self._last)
        self._last = now
        self._bar.set_postfix_str(self._text(chunk.index + 1, rate))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _text(self, done: int, rate: float | None) -> str:
        total = "endless" if self._num_chunks is None else str(self._num_chunks)
        speed = "" if rate is None else f", {rate:.2f} frames/s"
        return f"chunk {done}/{total}{speed}"


def _steps_before(plan: Plan, index: int) -> int:
    """Solver steps of all chunks before the index-th; the first chunk may have more."""
    return 0 if index == 0 else plan.steps_in_chunk(0) + (index - 1) * plan.steps_in_chunk(1)
