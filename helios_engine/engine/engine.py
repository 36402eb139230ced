"""Engine: weights and caches of one checkpoint on one device; makes chunks for any number of sessions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from helios_engine.engine import conditioning
from helios_engine.engine.autotune import settle_attention, settle_gemms
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.checks import (
    check_same_shape,
    check_state,
    checked_checkpoint,
    load_facts,
)
from helios_engine.engine.chunk import StepCallback
from helios_engine.engine.control import Control
from helios_engine.engine.devices import resolve_device, resolve_dtype
from helios_engine.engine.frames import FrameCodec
from helios_engine.engine.graphs import make_graphs
from helios_engine.engine.history import History
from helios_engine.engine.lane import make_lane, why_not_overlapped
from helios_engine.engine.maker import ChunkMaker
from helios_engine.engine.media import Clip
from helios_engine.engine.memory import advise_memory
from helios_engine.engine.offload import Turns, load_components
from helios_engine.engine.plan import Plan, plan_for
from helios_engine.engine.session import Point, PromptEmbeddings, VideoSession, VideoStream
from helios_engine.engine.state import SessionState
from helios_engine.model.reuse import Approximations
from helios_engine.model.text import TextEncoder
from helios_engine.model.transformer import Transformer
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.ops import native
from helios_engine.output import Video, collect
from helios_engine.parallel.context import ContextParallel
from helios_engine.request import VideoChunk, VideoRequest
from helios_engine.sampling.noise import NoiseSource
from helios_engine.settings import EngineConfig, describe_approximations
from helios_engine.trace import span

logger = logging.getLogger(__name__)


class Engine:
    """Owns weights, caches per shape and nothing of any video. Load one with Engine.load."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        transformer: Transformer,
        vae: VideoAutoencoder,
        text_encoder: TextEncoder | None,
        config: EngineConfig,
        context: ContextParallel | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        # Has a component's weights on the device, where components take turns.
        self._bring = turns.use if turns is not None else _is_there
        weight = transformer.project_out.weight
        self.device = resolve_device(config.device) if weight.is_meta else weight.device
        self.dtype = weight.dtype
        native.check(self.device)
        self.context = context or ContextParallel.single()
        attention = settle_attention(
            config.attention_backend, checkpoint.model, self.context, device=self.device, dtype=self.dtype
        )
        refresh, block_cache, uses_fp8 = config.approximations
        self.approximations = Approximations(refresh, block_cache)
        if uses_fp8:
            transformer.to_fp8_()
        if config.compile:
            transformer.compile_blocks()
        self._gemms = settle_gemms(config, self.device, self.dtype)
        transformer.connect(
            attention, self.context, ring_method=config.ring_method, exchange=config.exchange, gemms=self._gemms
        )
        graphs = make_graphs(transformer, config, self.device, approximates=self.approximations.any)
        overlaps = config.overlap_decode and self._can_overlap()
        self._frames = FrameCodec(
            vae,
            self.context,
            shard=config.shard_vae,
            counts_idle=lambda: not overlaps and not (graphs is not None and graphs.hold_memory),
        )
        self.maker = ChunkMaker(
            checkpoint,
            transformer,
            self._frames,
            device=self.device,
            config=config,
            context=self.context,
            lane=make_lane(self.device, overlaps=overlaps),
            overlaps=overlaps,
            graphs=graphs,
            approximations=self.approximations,
            bring=self._bring,
        )

    @classmethod
    def load(
        cls, path_or_id: str | Path, config: EngineConfig | None = None, context: ContextParallel | None = None
    ) -> Engine:
        """Load a checkpoint in the Diffusers layout from a local folder or a hub id (owner/name).

        context says which ranks work together; one process alone by default. All of its ranks load, with the same
        arguments, and make the same calls afterwards; frames are on rank 0 only, latents on every rank.

        Weights stream tensor by tensor to the device in the target dtype, so host memory stays near one tensor; with
        config.offload they come to the device when they are needed.
        Raises ValueError when the checkpoint or a setting is unusable, before anything large is read.
        """
        config, context = config or EngineConfig(), context or ContextParallel.single()
        with span("load"):
            checkpoint = context.agreed(
                lambda: checked_checkpoint(path_or_id, config, context), lambda found: load_facts(*found, config)
            )[0]
            device, dtype = resolve_device(config.device), resolve_dtype(config)
            encodes_text = context.is_first or config.text_encoder_ranks == "all"
            with context.guard(), advise_memory(checkpoint, config):
                parts = load_components(checkpoint, config, device, dtype, encodes_text=encodes_text)
                engine = cls(
                    checkpoint,
                    transformer=parts.transformer,
                    vae=parts.vae,
                    text_encoder=parts.text_encoder,
                    config=config,
                    context=context,
                    turns=parts.turns,
                )
        logger.info(
            "loaded %s (%s) on %s in %s, attention %s",
            checkpoint.name,
            checkpoint.recipe.variant,
            device,
            dtype,
            engine.transformer.attention.backend,
        )
        return engine

    def close(self) -> None:
        """Let go of threads, pinned memory, recorded steps and libraries; the engine computes nothing afterwards.

        Weights go with the engine itself. Only offload group, graphs and tuned products hold more than that.
        """
        self.transformer.close()
        if self.text_encoder is not None:
            self.text_encoder.close()
        if self.maker.graphs is not None:
            self.maker.graphs.forget()
        if self._gemms is not None:
            self.transformer.multiply_with(None)
            if not (self.context.is_broken or self.context.is_interrupted):  # it waits for what the device still does
                self._gemms.close()
            self._gemms = None

    def plan(self, request: VideoRequest) -> Plan:
        """What a request would compute; raises ValueError where this checkpoint cannot serve it."""
        if not isinstance(request, VideoRequest):
            raise ValueError(f"a request must be a VideoRequest, got {type(request).__name__}")
        plan = plan_for(self.checkpoint, request)
        if self.context.degrees.cfg > 1 and not plan.is_guided:
            raise ValueError(
                f"cfg degree 2 computes two guidance branches, but guidance_scale is {plan.recipe.guidance_scale:g}; "
                "use cfg degree 1"
            )
        for noisy_tokens in plan.tokens_per_stage:
            self.transformer.check_tokens(plan.history_tokens + noisy_tokens)
        return plan

    @torch.no_grad()
    def open(self, request: VideoRequest, on_step: StepCallback | None = None) -> VideoSession:
        """A session for one video, its prompt encoded and its history in place.

        on_step(stage, step, latents) is called after every solver step; latents [1, C, 9, h, w] are read-only. A chunk that
        has to be made anew, because recorded steps left too little memory, reports its steps again.
        """
        plan, pixels = self._agreed(request)
        return self._open(request, plan, pixels, on_step)

    @torch.no_grad()
    def restore(self, state: SessionState, on_step: StepCallback | None = None) -> VideoSession:
        """Continue a session from its state, bit for bit on the same kind of device and number of ranks."""
        settings = {**state.request, "prompt": None, "negative_prompt": None}
        request = VideoRequest.from_dict(
            {
                **settings,
                "prompt_embeds": state.positive,
                "negative_prompt_embeds": state.negative,
                "latents": state.initial,
            }
        )
        backend = self.transformer.attention.backend
        if state.attention not in ("", backend):
            logger.warning(
                "the state was made with attention %s and goes on with %s: numbers will differ by rounding",
                *(state.attention, backend),
            )
        noise = NoiseSource(0)

        def prepare() -> Plan:
            plan = self.plan(request)
            check_state(state, plan, channels=self.checkpoint.model.in_channels)
            try:
                noise.restore(state.noise)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"the state's noise generator is damaged: {error}") from None
            return plan

        plan = self.context.agreed(prepare, lambda _: request.facts() | state.facts())
        anchor = None if state.anchor is None else state.anchor.to(self.device)
        history = History(state.history.to(self.device), anchor)
        prompt = PromptEmbeddings(*(None if e is None else e.to(self.device) for e in (state.positive, state.negative)))
        return self._session(
            request,
            plan,
            prompt,
            point=Point(state.index, history, noise),
            settings=state.request,
            on_step=on_step,
        )

    def stream(
        self, request: VideoRequest | SessionState, on_step: StepCallback | None = None, *, progress: bool = False
    ) -> VideoStream:
        """Chunks as they are made; the first is out before the second is begun. num_frames=None never ends.

        A SessionState instead of a request goes on where that session stood. progress shows a bar on standard error.
        """
        start = self.restore if isinstance(request, SessionState) else self.open
        if not progress:
            return VideoStream(start(request, on_step))
        from helios_engine.engine.progress import ProgressBar

        session = start(request)
        bar = ProgressBar(session.plan, first_chunk=session.index)
        session.on_step = bar.step if on_step is None else _both(bar.step, on_step)
        return VideoStream(session, bar)

    def generate(self, request: VideoRequest, on_step: StepCallback | None = None, *, progress: bool = False) -> Video:
        """The whole video at once, held in memory."""
        if request.num_frames is None:
            raise ValueError("an endless video (num_frames=None) cannot be collected; use stream")
        with self.stream(request, on_step, progress=progress) as stream:
            return collect(stream, request, self.describe(stream.session.plan))

    def stream_batch(self, requests: Sequence[VideoRequest]) -> Iterator[list[VideoChunk]]:
        """Several videos of one shape side by side: one list of chunks per round, in the requests' order.

        Each video has its own seed and prompt and, up to rounding, the numbers it has alone. Raises ValueError when the
        requests differ in size, length, steps, guidance or text length; nothing is computed before that is checked.
        """
        if not isinstance(requests, Sequence) or not requests:
            raise ValueError("stream_batch needs a list of at least one request")

        def prepare() -> tuple[Plan, list[Tensor | Clip | None]]:
            plans = [self.plan(request) for request in requests]
            check_same_shape(requests, plans)
            return plans[0], [conditioning.load_pixels(request) for request in requests]

        def facts(_: object) -> dict[str, str]:
            return {f"{name} of request {i}": fact for i, r in enumerate(requests) for name, fact in r.facts().items()}

        return self._stream_batch(requests, *self.context.agreed(prepare, facts))

    def _stream_batch(
        self, requests: Sequence[VideoRequest], plan: Plan, pixels: list[Tensor | Clip | None]
    ) -> Iterator[list[VideoChunk]]:
        sessions = [self._open(*pair, None) for pair in zip(requests, [plan] * len(requests), pixels, strict=True)]
        control = sessions[0].control
        for session in sessions[1:]:
            session.control = control
        try:
            while not control.poll() and (chunks := self.advance(sessions)):
                yield chunks
        finally:
            for session in sessions:
                session.close()

    @torch.no_grad()
    def advance(self, sessions: Sequence[VideoSession]) -> list[VideoChunk]:
        """The next chunk of each session, computed side by side; empty when one of them was cancelled meanwhile.

        All sessions must have equal plans and stand at the same chunk.
        """
        return self.maker.advance(sessions)

    def describe(self, plan: Plan) -> dict[str, object]:
        """Facts worth keeping beside a video: model, recipe, versions."""
        from helios_engine import __version__

        recipe = plan.recipe
        return {
            "model": self.checkpoint.name,
            "variant": recipe.variant,
            "steps": list(recipe.steps),
            "guidance_scale": recipe.guidance_scale,
            "solver": self.checkpoint.scheduler.scheduler_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": self.transformer.attention.backend,
            "approximations": describe_approximations(self.config),
            "ranks": self.context.describe(),
            "helios_engine": __version__,
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def _open(
        self, request: VideoRequest, plan: Plan, pixels: Tensor | Clip | None, on_step: StepCallback | None
    ) -> VideoSession:
        noise = NoiseSource(request.seed)
        advice = advise_memory(self.checkpoint, self.config, plan, num_ranks=self.context.size)
        with self.context.guard(), advice:
            with span("text_encode"):
                self._bring("text_encoder")
                prompt = self._encode_prompt(request, plan)
            if pixels is not None:
                self._bring("vae")
            history = conditioning.start_history(
                request, pixels, noise, self._frames, channels=self.checkpoint.model.in_channels, device=self.device
            )
        return self._session(request, plan, prompt, point=Point(0, history, noise), on_step=on_step)

    def _agreed(self, request: VideoRequest) -> tuple[Plan, Tensor | Clip | None]:
        """The plan and the pixels read, when every rank was given the same request and can serve it."""
        return self.context.agreed(
            lambda: (self.plan(request), conditioning.load_pixels(request)), lambda _: request.facts()
        )

    def _session(
        self,
        request: VideoRequest,
        plan: Plan,
        prompt: PromptEmbeddings,
        *,
        point: Point,
        settings: dict[str, object] | None = None,
        on_step: StepCallback | None,
    ) -> VideoSession:
        self._bring("transformer")
        branches = (prompt.positive, prompt.negative) if plan.is_guided else (prompt.positive,)
        if self.context.degrees.cfg > 1:
            branches = branches[self.context.cfg_rank : self.context.cfg_rank + 1]
        try:
            texts = tuple(self.transformer.encode_text(embeds) for embeds in branches)
        finally:
            self.transformer.rest()
        return VideoSession(
            self,
            request,
            plan,
            prompt=prompt,
            texts=texts,
            point=point,
            control=Control(self.context),
            settings=settings,
            on_step=on_step,
        )

    def _encode_prompt(self, request: VideoRequest, plan: Plan) -> PromptEmbeddings:
        positive = self._embeddings(request.prompt, request.prompt_embeds, request.max_sequence_length)
        if not plan.is_guided:
            return PromptEmbeddings(positive, None)
        # Guidance without a negative prompt steers away from the empty one, as the reference does.
        negative_text = request.negative_prompt or ""
        negative = self._embeddings(negative_text, request.negative_prompt_embeds, request.max_sequence_length)
        return PromptEmbeddings(positive, negative)

    def _embeddings(self, prompt: str | None, embeds: Tensor | None, max_length: int) -> Tensor:
        if embeds is not None:
            return embeds.to(self.device, self.dtype)
        if self.text_encoder is not None:
            own = self.text_encoder.encode(prompt, max_length=max_length)
        else:
            shape = (1, max_length, self.checkpoint.model.text_dim)
            own = torch.empty(shape, dtype=self.dtype, device=self.device)
        return own if self.config.text_encoder_ranks == "all" else self.context.broadcast(own, "text")

    def _can_overlap(self) -> bool:
        config = self.config
        reason = why_not_overlapped(
            self.device, num_ranks=self.context.size, offload=config.offload, vae_dtype=config.vae_dtype
        )
        if reason is not None:
            logger.warning("chunks are decoded between the others' denoising, not beside it: %s", reason)
        return reason is None


def _is_there(component: str) -> None:
    """Every component's weights stay on the device."""


def _both(first: StepCallback, second: StepCallback) -> StepCallback:
    def call(stage: int, step: int, latents: Tensor) -> None:
        first(stage, step, latents)
        second(stage, step, latents)

    return call
