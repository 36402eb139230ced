"""A request read against a checkpoint: every number of the run, settled and checked before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig, Recipe, SchedulerConfig
from helios_engine.request import FRAMES_PER_CHUNK, VideoRequest
from helios_engine.sampling.schedule import StageSchedule, stage_schedules

if TYPE_CHECKING:
    from helios_engine.engine.checkpoint import Checkpoint

DISTILLED = "distilled"


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be computed for one video."""

    recipe: Recipe  # with the request's overrides
    height: int
    width: int
    num_frames: int | None
    num_chunks: int | None
    trim: bool
    stage_sizes: tuple[tuple[int, int], ...]  # latent rows and columns of each stage
    tokens_per_stage: tuple[int, ...]  # noisy tokens
    history_tokens: int
    schedules: tuple[StageSchedule, ...]
    first_schedules: tuple[StageSchedule, ...]  # of the first chunk

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.stage_sizes[-1]

    @property
    def is_guided(self) -> bool:
        return self.recipe.guidance_scale > 1.0

    def chunk_schedules(self, index: int) -> tuple[StageSchedule, ...]:
        return self.first_schedules if index == 0 else self.schedules

    def steps_in_chunk(self, index: int) -> int:
        return sum(schedule.num_steps for schedule in self.chunk_schedules(index))

    def holds_still(self, stage: int, step: int) -> bool:
        """Zero-init: the velocity is zero here, so no forward is run. Source: CFG-Zero*, arXiv 2503.18886."""
        recipe = self.recipe
        return self.is_guided and recipe.zero_init and stage == 0 and step <= recipe.zero_steps

    def frames_in_chunk(self, index: int) -> int:
        if self.num_frames is None or not self.trim:
            return FRAMES_PER_CHUNK
        return min(FRAMES_PER_CHUNK, self.num_frames - index * FRAMES_PER_CHUNK)


def make_plan(
    request: VideoRequest, *, recipe: Recipe, scheduler: SchedulerConfig, model: ModelConfig, has_text_encoder: bool
) -> Plan:
    """The plan of a request, or a ValueError that names the value, the rule and what to do."""
    recipe = _with_overrides(request, recipe)
    _check_size(request, recipe)
    _check_text(request, recipe, model, has_text_encoder)
    height, width = request.height // 8, request.width // 8
    stage_sizes = tuple((height >> shift, width >> shift) for shift in reversed(range(recipe.num_stages)))
    tokens = tuple(LATENT_FRAMES_PER_CHUNK * (rows // 2) * (columns // 2) for rows, columns in stage_sizes)
    _check_latents(request, model.in_channels, height, width)
    schedules = stage_schedules(scheduler, recipe, tokens_per_stage=tokens)
    first = schedules
    if recipe.amplify_first_chunk:
        first = stage_schedules(scheduler, recipe, tokens_per_stage=tokens, amplify=True)
    return Plan(
        recipe=recipe,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_chunks=request.num_chunks,
        trim=request.trim,
        stage_sizes=stage_sizes,
        tokens_per_stage=tokens,
        history_tokens=_history_tokens(height, width),
        schedules=schedules,
        first_schedules=first,
    )


def plan_for(checkpoint: Checkpoint, request: VideoRequest) -> Plan:
    """make_plan with a checkpoint's own configuration."""
    return make_plan(
        request,
        recipe=checkpoint.recipe,
        scheduler=checkpoint.scheduler,
        model=checkpoint.model,
        has_text_encoder=checkpoint.has_text_encoder,
    )


def _history_tokens(height: int, width: int) -> int:
    """Tokens of long (16 frames, 4x8x8 patches), mid (2, 2x4x4) and short (2, 1x2x2)."""
    return sum(frames * -(-height // size) * -(-width // size) for frames, size in ((16 // 4, 8), (2 // 2, 4), (2, 2)))


def _with_overrides(request: VideoRequest, recipe: Recipe) -> Recipe:
    changes: dict[str, object] = {}
    if request.steps is not None:
        steps = request.steps if isinstance(request.steps, tuple) else (request.steps,) * recipe.num_stages
        if len(steps) != recipe.num_stages:
            raise ValueError(
                f"steps must be one number or {recipe.num_stages} for this {recipe.variant} checkpoint, got "
                f"{len(steps)}: {','.join(map(str, steps))}"
            )
        changes["steps"] = steps
    if request.guidance_scale is not None:
        changes["guidance_scale"] = request.guidance_scale
    if request.amplify_first_chunk is not None:
        if request.amplify_first_chunk and recipe.variant != DISTILLED:
            raise ValueError(f"amplify_first_chunk has no effect on a {recipe.variant} checkpoint; leave it out")
        changes["amplify_first_chunk"] = request.amplify_first_chunk
    if request.zero_init is not None:
        if request.zero_init and not recipe.cfg_zero_star:
            raise ValueError(f"zero_init needs CFG-Zero*, which this {recipe.variant} checkpoint does not use")
        changes["zero_init"] = request.zero_init
    if (request.zero_init or request.zero_steps is not None) and changes.get(
        "guidance_scale", recipe.guidance_scale
    ) <= 1.0:
        raise ValueError("zero_init and zero_steps have no effect without guidance; leave them out")
    if request.zero_steps is not None:
        if not changes.get("zero_init", recipe.zero_init):
            raise ValueError("zero_steps has no effect without zero_init; leave it out")
        changes["zero_steps"] = request.zero_steps
    return dataclasses.replace(recipe, **changes)


def _check_size(request: VideoRequest, recipe: Recipe) -> None:
    multiple = recipe.size_multiple
    if request.height % multiple or request.width % multiple:
        raise ValueError(
            f"height and width must be multiples of {multiple} for a {recipe.num_stages}-stage {recipe.variant} "
            f"checkpoint, got {request.height}x{request.width}; try {_nearest(request.height, multiple)}x"
            f"{_nearest(request.width, multiple)}"
        )


def _nearest(size: int, multiple: int) -> int:
    return max(multiple, round(size / multiple) * multiple)


def _check_text(request: VideoRequest, recipe: Recipe, model: ModelConfig, has_text_encoder: bool) -> None:
    for name in ("prompt", "negative_prompt"):
        if getattr(request, name) is not None and not has_text_encoder:
            raise ValueError(f"{name} needs a text encoder and this checkpoint has none; give {name}_embeds")
        embeds = getattr(request, f"{name}_embeds")
        if embeds is not None and embeds.size(-1) != model.text_dim:
            raise ValueError(f"{name}_embeds must be {model.text_dim} wide for this checkpoint, got {embeds.size(-1)}")
    negative = request.negative_prompt is not None or request.negative_prompt_embeds is not None
    if recipe.guidance_scale <= 1.0 and negative:
        raise ValueError(
            f"a negative prompt has no effect at guidance_scale {recipe.guidance_scale:g}; leave it out or raise "
            "guidance_scale above 1"
        )
    if recipe.guidance_scale > 1.0 and not negative and not has_text_encoder:
        raise ValueError(
            f"guidance_scale {recipe.guidance_scale:g} needs negative_prompt_embeds, as this checkpoint has no text "
            "encoder to make the empty prompt's; or set guidance_scale to 1"
        )


def _check_latents(request: VideoRequest, channels: int, height: int, width: int) -> None:
    if request.latents is not None:
        if request.num_chunks is None:
            raise ValueError("latents cannot be given for an endless video; set num_frames")
        frames = LATENT_FRAMES_PER_CHUNK * request.num_chunks
        _check_latent_shape("latents", request.latents, (1, channels, frames, height, width))
    for name in ("image_latents", "fake_image_latents"):
        value = getattr(request, name)
        if value is not None:
            _check_latent_shape(name, value, (1, channels, 1, height, width))
    if request.video_latents is not None:
        frames = request.video_latents.size(2)
        if frames == 0 or frames % LATENT_FRAMES_PER_CHUNK:
            raise ValueError(
                f"video_latents must hold a multiple of {LATENT_FRAMES_PER_CHUNK} latent frames, got {frames}"
            )
        _check_latent_shape("video_latents", request.video_latents, (1, channels, frames, height, width))


def _check_latent_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} for this size and length, got {tuple(value.shape)}")
