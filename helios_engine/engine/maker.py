"""The next chunk of one or several videos: denoised, decoded, and where decoding overlaps the one after already begun."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.checks import check_same_latents
from helios_engine.engine.chunk import ChunkJob, ChunkWork
from helios_engine.engine.control import Cancelled
from helios_engine.engine.frames import FrameCodec, handed_over
from helios_engine.engine.graphs import StepGraphs
from helios_engine.engine.history import stacked_window
from helios_engine.engine.lane import Decoding, Lane, Pace
from helios_engine.engine.memory import OutOfMemory, advise_memory
from helios_engine.engine.session import Ahead, Point, VideoSession
from helios_engine.engine.stage import Stage
from helios_engine.model.context import TextContext
from helios_engine.model.reuse import Approximations
from helios_engine.model.transformer import Transformer
from helios_engine.parallel.context import ContextParallel
from helios_engine.request import ChunkTiming, VideoChunk
from helios_engine.sampling.pyramid import block_noise_factor
from helios_engine.settings import EngineConfig
from helios_engine.trace import chunk_span

logger = logging.getLogger(__name__)


class ChunkMaker:
    """Belongs to an engine and keeps nothing of any video.

    bring(component) has a component's weights on the device, where components take turns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        transformer: Transformer,
        codec: FrameCodec,
        *,
        device: torch.device,
        config: EngineConfig,
        context: ContextParallel,
        lane: Lane,
        overlaps: bool,
        graphs: StepGraphs | None,
        approximations: Approximations,
        bring: Callable[[str], None],
    ) -> None:
        self._checkpoint, self._transformer, self._codec = checkpoint, transformer, codec
        self._config, self._context = config, context
        self.lane, self.overlaps = lane, overlaps
        self.graphs, self._approximations, self._bring = graphs, approximations, bring
        self._noise_factor = block_noise_factor(checkpoint.scheduler.gamma).to(device)

    def advance(self, sessions: Sequence[VideoSession]) -> list[VideoChunk]:
        """See Engine.advance. Where recorded steps leave too little memory, they are given up and the chunk made anew."""
        try:
            return self._advance(sessions)
        except OutOfMemory:
            self._codec.forget_splits()
            if self._context.size > 1 or self.graphs is None or not self.graphs.hold_memory:
                raise
            self.graphs.give_up("they leave too little memory")
        torch.cuda.empty_cache()
        return self._advance(sessions)

    def _advance(self, sessions: Sequence[VideoSession]) -> list[VideoChunk]:
        index = sessions[0].index
        try:
            with (
                chunk_span(index),
                self._context.guard(expected=(Cancelled,)),
                sessions[0].control.computing(),
                advise_memory(self._checkpoint, self._config, sessions[0].plan, num_ranks=self._context.size),
            ):
                start = self.lane.mark()
                self._bring("transformer")
                work = self._begun(sessions)
                latents = work.finish()
                end = self.lane.mark()
                self._transformer.rest()
                own = [part.clone() if len(sessions) > 1 else part for part in latents.split(1)]
                points = tuple(
                    session.point_after(part, noise)
                    for session, part, noise in zip(sessions, own, work.job.noise, strict=True)
                )
                decoding = self.lane.begin(lambda: self._decode(sessions, own))
                try:
                    ahead = self._begin_ahead(sessions, points, decoding)
                finally:
                    decoding.wait()
        except BaseException as error:
            # A chunk that was not finished was not begun: the sessions stand where they stood.
            self._transformer.rest()
            if isinstance(error, Cancelled):
                return []
            raise
        for session, point in zip(sessions, points, strict=True):
            session.move_to(point)
        if not sessions[0].is_finished:
            sessions[0].ahead = ahead
        timing = ChunkTiming(self.lane.seconds(start, end), self.lane.seconds(decoding.start, decoding.end))
        frames = [handed_over(f, s.request.frames) for f, s in zip(decoding.frames, sessions, strict=True)]
        return [VideoChunk(index, *pair, timing) for pair in zip(frames, own, strict=True)]

    def _begun(self, sessions: Sequence[VideoSession]) -> ChunkWork:
        """The chunk as far as it was begun ahead, else from its start."""
        points = tuple(session.point for session in sessions)
        ahead, sessions[0].ahead = sessions[0].ahead, None
        if ahead is None or ahead.points != points:
            return self._begin(sessions, points)
        if ahead.error is not None:
            raise ahead.error
        return ahead.work

    def _begin_ahead(
        self, sessions: Sequence[VideoSession], points: tuple[Point, ...], decoding: Decoding
    ) -> Ahead | None:
        """Steps of the next chunk while this one is decoded. What goes wrong there is for that chunk to say."""
        if not self.overlaps or points[0].index == sessions[0].plan.num_chunks:
            return None
        try:
            work = self._begin(sessions, points)
            while not decoding.is_done() and work.step():
                pass
        except Cancelled:
            return None
        except torch.OutOfMemoryError:  # without the decoder beside it, it may have room
            logger.warning("chunk %d is not begun beside the decoder: it leaves too little memory", points[0].index)
            return None
        except Exception as error:
            return Ahead(points, None, error.with_traceback(None))  # which would hold what the step computed
        return Ahead(points, work)

    def _begin(self, sessions: Sequence[VideoSession], points: Sequence[Point]) -> ChunkWork:
        first, index = sessions[0], points[0].index
        texts = first.texts
        if len(sessions) > 1:
            texts = tuple(TextContext.stack(list(branch)) for branch in zip(*(s.texts for s in sessions), strict=True))
        initial = [session.initial_noise(index) for session in sessions]
        checks = self._config.check_ranks and self._context.size > 1

        def on_step(stage: int, step: int, latents: Tensor) -> None:
            if checks:
                check_same_latents(self._context, stage, step, latents)
            if first.on_step is not None:  # asked now: it may be another one than when the chunk was begun
                first.on_step(stage, step, latents.clone())

        job = ChunkJob(
            plan=first.plan,
            index=index,
            context=self._transformer.prepare(stacked_window([point.history for point in points]), texts),
            prompt_lengths=first.prompt.lengths,
            noise=tuple(point.noise.copy() for point in points),
            initial_BCTHW=None if initial[0] is None else torch.cat(initial),
            on_step=on_step,
            control=first.control,
            may_rest=self.overlaps,
            pace=Pace(self.lane),
            approximations=self._approximations,
            take_step=Stage.step if self.graphs is None else self.graphs,
        )
        return ChunkWork(self._transformer, self._checkpoint.scheduler, self._noise_factor, job)

    def _decode(self, sessions: Sequence[VideoSession], latents: Sequence[Tensor]) -> list[Tensor | None]:
        """Each video's frames on rank 0, None elsewhere."""
        self._bring("vae")
        return [
            self._codec.decode(part, s.request.frames, s.plan.frames_in_chunk(s.index))
            for s, part in zip(sessions, latents, strict=True)
        ]
