"""The state of one video, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from helios_engine.engine.chunk import StepCallback
from helios_engine.engine.control import Control
from helios_engine.engine.history import History
from helios_engine.engine.plan import Plan
from helios_engine.engine.state import SessionState, to_cpu
from helios_engine.model.transformer import TextContext
from helios_engine.request import VideoChunk, VideoRequest
from helios_engine.sampling.noise import NoiseSource

if TYPE_CHECKING:
    from helios_engine.engine.engine import Engine
    from helios_engine.engine.progress import ProgressBar


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeddings:
    """Text embeddings [1, T, E]; negative is None without guidance."""

    positive: Tensor
    negative: Tensor | None


class VideoSession:
    """One video in the making: history, anchor, noise generator, prompt, chunk index.

    next_chunk and the engine's calls belong to one thread at a time; cancel and close may come from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        request: VideoRequest,
        plan: Plan,
        *,
        prompt: PromptEmbeddings,
        texts: tuple[TextContext, ...],
        history: History,
        noise: NoiseSource,
        control: Control,
        settings: dict[str, object] | None = None,
        index: int = 0,
        on_step: StepCallback | None = None,
    ) -> None:
        self.request, self.plan = request.without_sources(), plan
        self.settings = request.settings() if settings is None else settings
        self.prompt, self.texts = prompt, texts
        self.history, self.noise = history, noise
        self.index = index
        self.on_step = on_step
        self._engine: Engine | None = engine
        self._initial = to_cpu(request.latents)
        self.control = control
        if self.index == plan.num_chunks:
            control.complete()

    @property
    def is_finished(self) -> bool:
        """True when no further chunk will come."""
        return self._engine is None or self.control.is_stopped

    def next_chunk(self) -> VideoChunk | None:
        """The next 33 frames, or None after the last chunk, a cancel or a close. On many ranks all of them call it."""
        engine = self._engine  # close may clear it from another thread
        if engine is None or self.control.poll():
            return None
        chunks = engine.advance([self])
        return chunks[0] if chunks else None

    def cancel(self) -> None:
        """End the video within one solver step; a next_chunk under way returns None. On many ranks rank 0's counts."""
        self.control.stop()

    def close(self) -> None:
        """End the video and let go of its memory. Closing twice is fine. On many ranks all of them call it."""
        self.control.close()
        self._engine, self._initial = None, None
        self.texts = ()

    def state(self) -> SessionState:
        """Everything Engine.restore needs to continue with the same numbers; between chunks."""
        if self._engine is None:
            raise ValueError("the session is closed; take its state before closing it")
        return SessionState(
            request=self.settings,
            index=self.index,
            history=to_cpu(self.history.frames_BCTHW),
            anchor=to_cpu(self.history.anchor_BC1HW),
            noise=self.noise.state(),
            positive=to_cpu(self.prompt.positive),
            negative=to_cpu(self.prompt.negative),
            initial=to_cpu(self._initial),
            attention=self._engine.transformer.attention.backend,
        )

    def __enter__(self) -> VideoSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows is called by Engine.advance alone.

    def initial_noise(self) -> Tensor | None:
        """Given start noise of the current chunk [1, C, 9, h, w] float32, or None when it is to be drawn."""
        if self._initial is None:
            return None
        frames = self._initial.size(2) // self.plan.num_chunks
        return self._initial[:, :, self.index * frames : (self.index + 1) * frames].float()

    def accept(self, latents_BCTHW: Tensor) -> None:
        """Take in a finished chunk's latents [1, C, 9, h, w] float32."""
        no_anchor = self.index == 0 and self.history.anchor_BC1HW is None
        if no_anchor or (self.request.skip_first_chunk and self.index == 1):
            self.history.anchor_BC1HW = latents_BCTHW[:, :, :1].clone()
        self.history.append(latents_BCTHW)
        self.index += 1
        if self.index == self.plan.num_chunks:
            self.control.complete()


class VideoStream:
    """Iterator over a session's chunks. Leaving the loop, close() and garbage collection end the video."""

    def __init__(self, session: VideoSession, bar: ProgressBar | None = None) -> None:
        self.session = session
        self._bar = bar

    def __iter__(self) -> VideoStream:
        return self

    def __next__(self) -> VideoChunk:
        chunk = self.session.next_chunk()
        if chunk is None:
            self.close()
            raise StopIteration
        if self._bar is not None:
            self._bar.chunk(chunk)
        return chunk

    def close(self) -> None:
        """End the video; from another thread, a chunk under way ends within one solver step."""
        self.session.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
