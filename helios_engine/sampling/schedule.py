"""Sigmas and timesteps of every pyramid stage, as plain host numbers.

Source: Diffusers HeliosScheduler.init_sigmas_for_each_stage and set_timesteps; the paper's section on pyramid flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from helios_engine.config import Recipe, SchedulerConfig

_FIRST_SIGMA = 0.999


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """One pyramid stage: what the model is told (timesteps) and where the solver stands (sigmas)."""

    timesteps: tuple[float, ...]  # what the model sees, one per step
    sigmas: tuple[float, ...]  # one more than timesteps; the last is where the stage ends
    ori_start_sigma: float  # global sigma at which the stage begins, before the re-noise correction

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True)
class _StageRange:
    ori_start_sigma: float
    timestep_max: float
    timestep_min: float
    sigma_last: float


def _global_sigmas(config: SchedulerConfig) -> np.ndarray:
    sigmas = 1.0 - np.linspace(1, 1 / config.num_train_timesteps, config.num_train_timesteps + 1)
    return np.flip(config.shift * sigmas / (1 + (config.shift - 1) * sigmas))[:-1].copy()


def _stage_ranges(config: SchedulerConfig) -> list[_StageRange]:
    """Split the global noise range over the stages, each in proportion to the distance it travels."""
    num_train = config.num_train_timesteps
    sigmas = _global_sigmas(config)
    timesteps = sigmas * num_train
    starts, distances = [], []
    for stage in range(config.stages):
        start = max(int(config.stage_range[stage] * num_train), 0)
        end = min(int(config.stage_range[stage + 1] * num_train), num_train)
        ori_start_sigma = float(sigmas[start])
        end_sigma = float(sigmas[end]) if end < num_train else 0.0
        corrected = ori_start_sigma
        if stage:
            signal = 1 - ori_start_sigma
            corrected = 1 - signal / (math.sqrt(1 + 1 / config.gamma) * (1 - signal) + signal)
        starts.append(ori_start_sigma)
        distances.append(corrected - end_sigma)
    total = sum(distances)
    ranges = []
    for stage, ori_start_sigma in enumerate(starts):
        start_ratio = sum(distances[:stage]) / total if stage else 0.0
        # Just below one: the index it becomes must stay inside the table.
        end_ratio = sum(distances[: stage + 1]) / total if stage + 1 < config.stages else 0.9999999999999999
        timestep_max = min(float(timesteps[int(start_ratio * num_train)]), 999)
        timestep_min = float(timesteps[min(int(end_ratio * num_train), num_train - 1)])
        # The range is cut into num_train intervals and the stage ends one interval before the next one starts.
        inside = np.linspace(timestep_max, timestep_min, num_train + 1)[:-1]
        sigma_last = float(np.linspace(_FIRST_SIGMA, 0, num_train + 1)[-2])
        ranges.append(_StageRange(ori_start_sigma, float(inside[0]), float(inside[-1]), sigma_last))
    return ranges


def _shift(config: SchedulerConfig, sigmas: np.ndarray, num_tokens: int) -> np.ndarray:
    """Move sigmas towards noise the more tokens there are; zero stays zero."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = num_tokens * slope + (config.base_shift - slope * config.base_image_seq_len)
    factor = math.exp(mu) if config.time_shift_type == "exponential" else mu
    with np.errstate(divide="ignore"):
        return factor / (factor + (1 / sigmas - 1))


def stage_schedules(
    config: SchedulerConfig, recipe: Recipe, *, tokens_per_stage: tuple[int, ...], amplify: bool = False
) -> tuple[StageSchedule, ...]:
    """The schedule of each stage for one chunk.

    tokens_per_stage counts the noisy tokens of each stage, lowest resolution first. Stage i > 0 is shifted by the
    token count of stage i - 1, because the reference sets its timesteps before it enlarges the latents. With
    amplify, a distilled model takes twice the steps (its first chunk has no history to lean on).
    """
    if recipe.num_stages == 1:
        sigmas = np.linspace(_FIRST_SIGMA, 0.0, recipe.steps[0] + 1)
        if config.use_dynamic_shifting:
            sigmas = _shift(config, sigmas, tokens_per_stage[0])
        timesteps = sigmas[:-1] * config.num_train_timesteps
        ori_start_sigma = float(_global_sigmas(config)[0])
        return (StageSchedule(tuple(timesteps.tolist()), tuple(sigmas.tolist()), ori_start_sigma),)
    ranges = _stage_ranges(config)
    return tuple(
        _pyramid_stage(config, ranges[stage], num_steps=steps * (2 if amplify else 1), num_tokens=num_tokens)
        for stage, (steps, num_tokens) in enumerate(
            zip(recipe.steps, (tokens_per_stage[0], *tokens_per_stage[:-1]), strict=True)
        )
    )


def _pyramid_stage(config: SchedulerConfig, span: _StageRange, *, num_steps: int, num_tokens: int) -> StageSchedule:
    # The distilled solver lays out one point more than it uses and drops the last but one.
    num_points = num_steps + 1 if config.scheduler_type == "dmd" else num_steps
    timesteps = np.linspace(span.timestep_max, span.timestep_min, num_points)[:num_steps]
    sigmas = np.append(np.linspace(_FIRST_SIGMA, span.sigma_last, num_points)[:num_steps], 0.0)
    if config.use_dynamic_shifting:
        sigmas = _shift(config, sigmas, num_tokens)
        timesteps = span.timestep_min + sigmas[:-1] * (span.timestep_max - span.timestep_min)
    return StageSchedule(tuple(timesteps.tolist()), tuple(sigmas.tolist()), span.ori_start_sigma)
