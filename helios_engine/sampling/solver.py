"""From a velocity to the next latents: UniPC, Euler and the distilled model's x0 re-noising.

Every coefficient is a host number computed once per schedule in float64; a step is a linear combination of tensors.
Source: UniPC (arXiv 2302.04867) as in Diffusers HeliosScheduler; HeliosDMDScheduler for the distilled rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from helios_engine.config import SchedulerConfig
from helios_engine.ops import native as ops
from helios_engine.sampling.schedule import StageSchedule

_SIGMA_FLOOR = 1e-8  # the reference's clamp, so that the logarithm at sigma = 0 is finite


class Solver(Protocol):
    """Walks the latents of one stage from its first sigma to its last."""

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """Latents [B, C, T, H, W] after step `index`; the velocity comes as output rows [B, N, patch * C]."""
        ...


def make_solver(config: SchedulerConfig, schedule: StageSchedule, start: Tensor, patch: tuple[int, int, int]) -> Solver:
    """A fresh solver for one stage of one chunk; start is the stage's first latents, patch the size of an output row's patch."""
    if config.scheduler_type == "dmd":
        return DMDSolver(schedule, start, patch)
    if config.scheduler_type == "euler":
        return EulerSolver(schedule, patch)
    return UniPCSolver(unipc_coefficients(config, schedule.sigmas), patch)


class EulerSolver:
    """x + (next sigma - sigma) * velocity, in float32."""

    def __init__(self, schedule: StageSchedule, patch: tuple[int, int, int]) -> None:
        self._sigmas, self._patch = schedule.sigmas, patch

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        return ops.euler_step(latents, velocity, self._patch, delta=self._sigmas[index + 1] - self._sigmas[index])


class DMDSolver:
    """Jump to x0, then mix the stage's own starting latents back in; the last step of a stage returns x0."""

    def __init__(self, schedule: StageSchedule, start: Tensor, patch: tuple[int, int, int]) -> None:
        self._start, self._patch = start, patch
        # The reference finds a step's sigma by the nearest timestep to the truncated one.
        points = np.asarray(schedule.timesteps)
        nearest = [int(np.abs(points - int(timestep)).argmin()) for timestep in schedule.timesteps]
        self._sigmas = tuple(schedule.sigmas[index] for index in nearest)

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        is_last = index + 1 == len(self._sigmas)
        return ops.dmd_step(
            *(latents, velocity, None if is_last else self._start, self._patch),
            sigma=self._sigmas[index],
            sigma_next=0.0 if is_last else self._sigmas[index + 1],
        )


@dataclass(frozen=True, slots=True)
class UniPCStep:
    """One step as linear combinations. Histories run from the newest x0 prediction to older ones."""

    sigma: float
    correct_base: float | None  # times the previous step's base; None where there is no corrector
    correct_current: float  # times this step's x0
    correct_history: tuple[float, ...]
    predict_base: float
    predict_history: tuple[float, ...]  # first entry: this step's x0


class UniPCSolver:
    """Multistep predictor-corrector in float32."""

    def __init__(self, steps: tuple[UniPCStep, ...], patch: tuple[int, int, int]) -> None:
        self._steps, self._patch = steps, patch
        self._kept = max(len(step.predict_history) for step in steps)
        self._history: list[Tensor] = []  # x0 predictions, newest first
        self._base: Tensor | None = None

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        rule, count = self._steps[index], len(self._history)
        corrects = rule.correct_base is not None and self._base is not None
        correct = (rule.correct_base, rule.correct_current, *rule.correct_history) if corrects else ()
        following, base, x0 = ops.unipc_step(
            *(latents, velocity, self._base if corrects else None, self._history, self._patch),
            sigma=rule.sigma,
            correct=_filled(correct, 2 + count),
            predict=_filled((rule.predict_base, *rule.predict_history), 2 + count),
        )
        self._history = [x0, *self._history][: self._kept]
        self._base = base
        return following


def _filled(numbers: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The first count numbers, zeros where there are fewer: earlier points that a rule does not use."""
    return (*numbers[:count], *(0.0,) * (count - len(numbers)))


def unipc_coefficients(config: SchedulerConfig, sigmas: tuple[float, ...]) -> tuple[UniPCStep, ...]:
    """The linear combinations of every step, folded from the B(h) update rules."""
    num_steps = len(sigmas) - 1
    orders: list[int] = []
    steps = []
    for index in range(num_steps):
        corrector: tuple[float | None, float, tuple[float, ...]] = (None, 0.0, ())
        if index > 0 and index - 1 not in config.disable_corrector:
            corrector = _corrector(config, sigmas, index, orders[-1])
        order = min(config.solver_order, index + 1)
        if config.lower_order_final:
            order = min(order, num_steps - index)
        orders.append(order)
        base, history = _predictor(config, sigmas, index, order)
        steps.append(UniPCStep(sigmas[index], *corrector, base, history))
    return tuple(steps)


def _log_signal_to_noise(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(max(sigma, _SIGMA_FLOOR))


@dataclass(frozen=True, slots=True)
class _Update:
    """Shared numbers of one B(h) update from the point `origin` to sigma `target`."""

    base: float
    newest: float  # -alpha * (e^h - 1)
    residual: float  # -alpha * B(h)
    ratios: np.ndarray  # r_k of the older points, then 1.0
    matrix: np.ndarray
    vector: np.ndarray


def _update(config: SchedulerConfig, sigmas: tuple[float, ...], *, origin: int, target: float, order: int) -> _Update:
    origin_log = _log_signal_to_noise(sigmas[origin])
    step = _log_signal_to_noise(target) - origin_log
    ratios = [(_log_signal_to_noise(sigmas[origin - k]) - origin_log) / step for k in range(1, order)]
    ratios.append(1.0)
    negative = -step
    phi_1 = math.expm1(negative)
    scale = negative if config.solver_type == "bh1" else phi_1
    phi_k = phi_1 / negative - 1
    factorial = 1
    vector = []
    for k in range(1, order + 1):
        vector.append(phi_k * factorial / scale)
        factorial *= k + 1
        phi_k = phi_k / negative - 1 / factorial
    alpha = 1 - target
    return _Update(
        base=max(target, _SIGMA_FLOOR) / max(sigmas[origin], _SIGMA_FLOOR),
        newest=-alpha * phi_1,
        residual=-alpha * scale,
        ratios=np.array(ratios),
        matrix=np.array([np.power(ratios, k) for k in range(order)]),
        vector=np.array(vector),
    )


def _predictor(
    config: SchedulerConfig, sigmas: tuple[float, ...], index: int, order: int
) -> tuple[float, tuple[float, ...]]:
    update = _update(config, sigmas, origin=index, target=sigmas[index + 1], order=order)
    if order == 1:
        return update.base, (update.newest,)
    # Order two has its weight fixed at one half, as the reference does.
    weights = np.array([0.5]) if order == 2 else np.linalg.solve(update.matrix[:-1, :-1], update.vector[:-1])
    older = update.residual * weights / update.ratios[:-1]
    return update.base, (update.newest - float(older.sum()), *older.tolist())


def _corrector(
    config: SchedulerConfig, sigmas: tuple[float, ...], index: int, order: int
) -> tuple[float, float, tuple[float, ...]]:
    update = _update(config, sigmas, origin=index - 1, target=sigmas[index], order=order)
    weights = np.array([0.5]) if order == 1 else np.linalg.solve(update.matrix, update.vector)
    older = update.residual * weights[:-1] / update.ratios[:-1]
    current = update.residual * float(weights[-1])
    return update.base, current, (update.newest - float(older.sum()) - current, *older.tolist())
