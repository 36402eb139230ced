"""Denoising of one chunk, for one video or several side by side.

# B videos, C latent channels, T = 9 latent frames, H W latent rows and columns, N tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, SchedulerConfig
from helios_engine.engine.control import Control
from helios_engine.engine.plan import Plan
from helios_engine.engine.stage import Guidance, Stage
from helios_engine.model.context import ChunkContext
from helios_engine.model.reuse import Approximations, Reuse
from helios_engine.model.transformer import Transformer
from helios_engine.ops.pinned import to_device
from helios_engine.sampling import pyramid
from helios_engine.sampling.noise import NoiseSource
from helios_engine.sampling.schedule import StageSchedule
from helios_engine.sampling.solver import make_solver
from helios_engine.trace import span

StepCallback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """What one chunk of one or more equal-shaped videos needs besides the network."""

    plan: Plan
    index: int
    context: ChunkContext
    prompt_lengths: tuple[int, ...]
    noise: tuple[NoiseSource, ...]  # one per video, the job's own
    initial_BCTHW: Tensor | None  # given start noise; else it is drawn
    on_step: StepCallback
    control: Control  # asked before every step
    may_rest: bool  # between steps
    pace: Callable[[], None]  # called after every step; may wait for the device
    approximations: Approximations
    take_step: Callable[[Stage], None]  # a stage's next step, recorded or plain


class ChunkWork:
    """A chunk's denoising, which may rest between any two steps."""

    def __init__(
        self, transformer: Transformer, scheduler: SchedulerConfig, noise_factor: Tensor, job: ChunkJob
    ) -> None:
        self.job = job
        self._steps = _denoise(transformer, scheduler, noise_factor, job)
        self._latents: Tensor | None = None

    def step(self) -> bool:
        """One step more; False when there was none left."""
        if self._latents is None:
            try:
                next(self._steps)
            except StopIteration as end:
                self._latents = end.value
        return self._latents is None

    def finish(self) -> Tensor:
        """All steps that are left; clean latents [B, C, 9, H, W] at full resolution, float32."""
        while self.step():
            pass
        return self._latents


def _denoise(
    transformer: Transformer, scheduler: SchedulerConfig, noise_factor: Tensor, job: ChunkJob
) -> Generator[None, None, Tensor]:
    """Yields after every step where the job may rest, outside of all ranges: they must not span what happens meanwhile."""
    plan = job.plan
    dtype, device = transformer.project_out.weight.dtype, transformer.project_out.weight.device
    latents = pyramid.shrink_noise(to_device(_initial_noise(transformer, job), device), plan.recipe.num_stages)
    for stage, schedule in enumerate(plan.chunk_schedules(job.index)):
        with contextlib.ExitStack() as ranges:
            ranges.enter_context(span(f"stage {stage}"))
            if stage:
                alpha, beta = pyramid.renoise_weights(schedule.ori_start_sigma, scheduler.gamma)
                draws = _block_draws(latents, job)
                latents = pyramid.enlarge(latents, draws, noise_factor, alpha=alpha, beta=beta, dtype=dtype)
            work = _stage(transformer, scheduler, schedule, job, latents)
            for step in range(schedule.num_steps):
                job.control.check()
                with span("step"):
                    if plan.holds_still(stage, step):
                        work.hold_still()
                    else:
                        job.take_step(work)
                job.on_step(stage, step, work.solver.latents)
                job.pace()
                if job.may_rest:
                    ranges.close()
                    yield
                    ranges.enter_context(span(f"stage {stage}"))
            latents = work.solver.result(dtype)
    return latents.float()


def _stage(
    transformer: Transformer, scheduler: SchedulerConfig, schedule: StageSchedule, job: ChunkJob, start: Tensor
) -> Stage:
    recipe, reuse = job.plan.recipe, None
    if job.approximations.any:
        reuse = Reuse(job.approximations, len(job.context.texts), len(transformer.blocks))
    shown = [float(int(timestep)) if recipe.integer_timesteps else timestep for timestep in schedule.timesteps]
    return Stage(
        transformer,
        make_solver(scheduler, schedule, start, transformer.config.patch_size),
        times=transformer.embed.times(shown),
        context=transformer.with_room(job.context, start),
        guidance=Guidance(recipe.guidance_scale, recipe.cfg_zero_star) if job.plan.is_guided else None,
        reuse=reuse,
        prompt_lengths=job.prompt_lengths,
    )


def _initial_noise(transformer: Transformer, job: ChunkJob) -> Tensor:
    if job.initial_BCTHW is not None:
        return job.initial_BCTHW
    shape = (1, transformer.config.in_channels, LATENT_FRAMES_PER_CHUNK, *job.plan.latent_size)
    return torch.cat([source.normal(*shape) for source in job.noise])


def _block_draws(latents_BCTHW: Tensor, job: ChunkJob) -> Tensor:
    """Normal draws [B * C * T * H * W, 4], a block each, every video's from its own source."""
    num_blocks = latents_BCTHW[0].numel()
    return to_device(torch.cat([source.normal(num_blocks, 4) for source in job.noise]), latents_BCTHW.device)
