"""From a velocity to the next latents: UniPC, Euler and the distilled model's x0 re-noising.

Every coefficient is computed once per schedule in float64 on the host and read by its step from a table in device memory;
a step is a linear combination of tensors.
Source: UniPC (arXiv 2302.04867) as in Diffusers HeliosScheduler; HeliosDMDScheduler for the distilled rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helios_engine.config import SchedulerConfig
from helios_engine.ops import native as ops
from helios_engine.ops.pinned import to_device
from helios_engine.sampling.schedule import StageSchedule

_SIGMA_FLOOR = 1e-8  # the reference's clamp, so that the logarithm at sigma = 0 is finite


@dataclass(frozen=True, slots=True)
class Solver:
    """Walks the latents of one stage from its first sigma to its last.

    All that it knows lies in device memory, so a step asks nothing of the host and may be recorded.
    """

    rule: str  # euler | dmd | unipc
    patch: tuple[int, int, int]  # the size of an output row's patch
    latents: Tensor  # [B, C, T, H, W], changed by every step
    index: Tensor  # int64 [1], the steps taken so far
    coefficients: Tensor  # float64 [steps, width], see ops
    carried: tuple[Tensor, ...]  # from step to step: nothing for euler, the start for dmd, history and base for unipc

    def step(self, velocity: Tensor) -> None:
        """The next step, in place; the velocity comes as output rows [B, N, patch * C]."""
        step = {"euler": ops.euler_step_, "dmd": ops.dmd_step_, "unipc": ops.unipc_step_}[self.rule]
        step(self.latents, velocity, *self.carried, self.coefficients, self.index, self.patch)
        self.index.add_(1)

    def result(self, dtype: torch.dtype) -> Tensor:
        """A copy of the latents as the next stage takes them, after the last step; dtype is the velocity's.

        The distilled rule ends on x0, which has the velocity's dtype.
        """
        return self.latents.to(dtype if self.rule == "dmd" else torch.float32, copy=True)

    def state(self) -> tuple[Tensor, ...]:
        """What a step changes."""
        return (self.latents, self.index, *self.carried)

    def blank(self, num_steps: int) -> Solver:
        """One of the same make, with room for so many steps, that knows nothing yet."""
        latents, index, *carried = map(torch.zeros_like, self.state())
        coefficients = self.coefficients.new_zeros(num_steps, self.coefficients.size(1))
        return Solver(self.rule, self.patch, latents, index, coefficients, tuple(carried))


def make_solver(config: SchedulerConfig, schedule: StageSchedule, start: Tensor, patch: tuple[int, int, int]) -> Solver:
    """A fresh solver for one stage of one chunk; start is the stage's first latents, patch the size of an output row's patch."""
    start = start.contiguous()  # clones keep other strides, which the compiled steps do not take
    if config.scheduler_type == "dmd":
        latents, rows, carried = start.clone(), _dmd_coefficients(schedule), (start.clone(),)
    elif config.scheduler_type == "euler":
        latents, carried = start.to(torch.float32, copy=True), ()
        rows = [(end - sigma,) for sigma, end in zip(schedule.sigmas, schedule.sigmas[1:], strict=False)]
    else:
        latents = start.to(torch.float32, copy=True)
        steps = unipc_coefficients(config, schedule.sigmas)
        kept = max(len(step.predict_history) for step in steps)
        rows = [step.row(kept) for step in steps]
        carried = (latents.new_zeros(kept, *latents.shape), torch.zeros_like(latents))
    table = to_device(torch.tensor(rows, dtype=torch.float64), start.device)
    index = torch.zeros(1, dtype=torch.int64, device=start.device)
    return Solver(config.scheduler_type, patch, latents, index, table, carried)


def _dmd_coefficients(schedule: StageSchedule) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step: jump to x0, then mix the stage's own start back in; the last step stays at x0."""
    # The reference finds a step's sigma by the nearest timestep to the truncated one.
    points = np.asarray(schedule.timesteps)
    nearest = [int(np.abs(points - int(timestep)).argmin()) for timestep in schedule.timesteps]
    sigmas = [schedule.sigmas[index] for index in nearest]
    return list(zip(sigmas, [*sigmas[1:], 0.0], strict=True))


@dataclass(frozen=True, slots=True)
class UniPCStep:
    """One step as linear combinations. Histories run from the newest x0 prediction to older ones."""

    sigma: float
    correct_base: float | None  # times the previous step's base; None where there is no corrector
    correct_current: float  # times this step's x0
    correct_history: tuple[float, ...]
    predict_base: float
    predict_history: tuple[float, ...]  # first entry: this step's x0

    def row(self, kept: int) -> tuple[float, ...]:
        """As ops.unipc_step_ reads it, with room for kept earlier x0."""
        corrects = self.correct_base is not None
        correct = (self.correct_base or 0.0, self.correct_current, *self.correct_history)
        predict = (self.predict_base, *self.predict_history)
        return (self.sigma, float(corrects), *_filled(correct, 2 + kept), *_filled(predict, 2 + kept))


def _filled(numbers: Sequence[float], count: int) -> tuple[float, ...]:
    """Count numbers, zeros behind those there are."""
    return (*numbers, *(0.0,) * (count - len(numbers)))


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
