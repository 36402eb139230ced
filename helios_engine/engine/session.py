"""The state of one video, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from helios_engine.engine.chunk import ChunkWork, StepCallback
from helios_engine.engine.control import Control
from helios_engine.engine.history import History
from helios_engine.engine.plan import Plan
from helios_engine.engine.state import SessionState, to_cpu
from helios_engine.model.context import TextContext
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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each."""
        return tuple(part.size(1) for part in (self.positive, self.negative) if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """Where a video stands between two chunks. Chunks draw from a copy of the noise, so a point stays what it is."""

    index: int  # of the chunk that comes next
    history: History
    noise: NoiseSource


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """What was begun of the next chunk while the one before was decoded, or why it failed."""

    points: tuple[Point, ...]  # where each of its videos stood
    work: ChunkWork | None
    error: Exception | None = None


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
        point: Point,
        control: Control,
        settings: dict[str, object] | None = None,
        on_step: StepCallback | None = None,
    ) -> None:
        self.request, self.plan = request.without_sources(), plan
        self.settings = request.settings() if settings is None else settings
        self.prompt, self.texts = prompt, texts
        self.point = point
        self.ahead: Ahead | None = None
        self.on_step = on_step
        self._engine: Engine | None = engine
        self._initial = to_cpu(request.latents)
        self.control = control
        if self.index == plan.num_chunks:
            control.complete()

    @property
    def index(self) -> int:
        """The chunk that comes next, from 0."""
        return self.point.index

    @property
    def history(self) -> History:
        return self.point.history

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
        self._engine, self._initial, self.ahead = None, None, None
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
            noise=self.point.noise.state(),
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

    def initial_noise(self, index: int) -> Tensor | None:
        """Given start noise of a chunk [1, C, 9, h, w] float32, or None when it is to be drawn."""
        if self._initial is None:
            return None
        frames = self._initial.size(2) // self.plan.num_chunks
        return self._initial[:, :, index * frames : (index + 1) * frames].float()

    def point_after(self, latents_BCTHW: Tensor, noise: NoiseSource) -> Point:
        """Where the video stands after a chunk with these latents [1, C, 9, h, w] float32."""
        no_anchor = self.index == 0 and self.history.anchor_BC1HW is None
        takes_anchor = no_anchor or (self.request.skip_first_chunk and self.index == 1)
        anchor = latents_BCTHW[:, :, :1].clone() if takes_anchor else None
        return Point(self.index + 1, self.history.after(latents_BCTHW, anchor), noise)

    def move_to(self, point: Point) -> None:
        """The chunk before this point is made."""
        self.point = point
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
