"""Denoising of one chunk, for one video or several side by side.

# B videos, C latent channels, T = 9 latent frames, H W latent rows and columns, N tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_engine.config import LATENT_FRAMES_PER_CHUNK, SchedulerConfig
from helios_engine.engine.control import Control
from helios_engine.engine.plan import Plan
from helios_engine.model.transformer import ChunkContext, Transformer
from helios_engine.ops import reference as ops
from helios_engine.sampling import guidance, pyramid
from helios_engine.sampling.noise import NoiseSource
from helios_engine.sampling.solver import make_solver
from helios_engine.trace import span

StepCallback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """What one chunk of one or more equal-shaped videos needs besides the network."""

    plan: Plan
    index: int
    context: ChunkContext
    noise: tuple[NoiseSource, ...]  # one per video
    initial_BCTHW: Tensor | None  # given start noise; else it is drawn
    on_step: StepCallback | None
    control: Control  # asked before every step


def denoise_chunk(transformer: Transformer, scheduler: SchedulerConfig, noise_factor: Tensor, job: ChunkJob) -> Tensor:
    """Clean latents [B, C, 9, H, W] of the chunk at full resolution."""
    plan = job.plan
    dtype, device = transformer.project_out.weight.dtype, transformer.project_out.weight.device
    latents = pyramid.shrink_noise(_initial_noise(transformer, job).to(device), plan.recipe.num_stages)
    for stage, schedule in enumerate(plan.chunk_schedules(job.index)):
        with span("stage"):
            if stage:
                alpha, beta = pyramid.renoise_weights(schedule.ori_start_sigma, scheduler.gamma)
                noise = _block_noise(latents, noise_factor, job).to(dtype)
                latents = pyramid.enlarge(latents, noise, alpha=alpha, beta=beta)
            solver = make_solver(scheduler, schedule, latents)
            for step, timestep in enumerate(schedule.timesteps):
                job.control.check()
                with span("step"):
                    velocity = _velocity(transformer, job, latents, stage, step, timestep)
                    latents = solver.step(latents, velocity, step)
                if job.on_step is not None:
                    job.on_step(stage, step, latents)
    return latents.float()


def _initial_noise(transformer: Transformer, job: ChunkJob) -> Tensor:
    if job.initial_BCTHW is not None:
        return job.initial_BCTHW
    shape = (1, transformer.config.in_channels, LATENT_FRAMES_PER_CHUNK, *job.plan.latent_size)
    return torch.cat([source.normal(*shape) for source in job.noise])


def _block_noise(latents_BCTHW: Tensor, factor: Tensor, job: ChunkJob) -> Tensor:
    """Correlated noise at twice the resolution of the latents, each video's from its own source."""
    _, channels, frames, height, width = latents_BCTHW.shape
    shape = (1, channels, frames, height * 2, width * 2)
    num_blocks = channels * frames * height * width
    draws = (source.normal(num_blocks, 4).to(factor.device) for source in job.noise)
    return torch.cat([pyramid.block_noise(draw, factor, shape) for draw in draws])


def _velocity(
    transformer: Transformer, job: ChunkJob, latents: Tensor, stage: int, step: int, timestep: float
) -> Tensor:
    """The (guided) velocity [B, C, 9, H, W] in the model's dtype."""
    plan = job.plan
    dtype = transformer.project_out.weight.dtype
    if plan.holds_still(stage, step):
        return torch.zeros_like(latents, dtype=dtype)
    shown = float(int(timestep)) if plan.recipe.integer_timesteps else timestep
    rows = transformer(latents.to(dtype), shown, job.context)
    rows_BND = rows[0]
    if plan.is_guided:
        recipe = plan.recipe
        rows_BND = guidance.combine(*rows, scale=recipe.guidance_scale, zero_star=recipe.cfg_zero_star)
    grid = (latents.size(2), latents.size(3) // 2, latents.size(4) // 2)
    return ops.unpatchify(rows_BND, grid, transformer.config.patch_size)
