"""Schedules, solvers, pyramid moves, guidance and noise against Diffusers or a formula; no network involved."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import HeliosDMDScheduler, HeliosPyramidPipeline, HeliosScheduler
from diffusers.pipelines.helios.pipeline_helios_pyramid import calculate_shift, optimized_scale
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_engine.config import Recipe, SchedulerConfig
from helios_engine.ops.reference import patch_rows
from helios_engine.sampling import guidance, pyramid
from helios_engine.sampling.noise import NoiseSource, blend_with_noise
from helios_engine.sampling.schedule import stage_schedules
from helios_engine.sampling.solver import make_solver
from tests.helpers import oracle

PATCH = (1, 2, 2)
TOKENS = (540, 2160, 8640)
PYRAMID = Recipe("mid", steps=(1, 1, 1), guidance_scale=1.0)


def _as_rows(velocity: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer's output rows: patches, channel fastest."""
    batch, channels = velocity.shape[:2]
    rows = patch_rows(velocity, PATCH).unflatten(-1, (channels, -1)).transpose(2, 3)
    return rows.reshape(batch, rows.size(1), -1)


def _oracle(config: SchedulerConfig):
    values = {"use_dynamic_shifting": config.use_dynamic_shifting, "time_shift_type": config.time_shift_type}
    values |= {"stages": config.stages, "stage_range": list(config.stage_range), "gamma": config.gamma}
    values |= {"shift": config.shift}
    if config.scheduler_type == "dmd":
        return HeliosDMDScheduler(**values)
    values |= {"scheduler_type": config.scheduler_type, "solver_order": config.solver_order}
    values |= {"solver_type": config.solver_type, "lower_order_final": config.lower_order_final}
    return HeliosScheduler(**values, disable_corrector=list(config.disable_corrector))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["unipc", "euler", "dmd"]),
    dynamic=st.booleans(),
    shift_type=st.sampled_from(["exponential", "linear"]),
    gamma=st.sampled_from([1 / 3, 0.25, 0.1]),
    steps=st.tuples(*[st.integers(1, 12)] * 3),
    amplify=st.booleans(),
)
def test_pyramid_schedule_equals_diffusers(kind, dynamic, shift_type, gamma, steps, amplify) -> None:
    config = SchedulerConfig(kind, use_dynamic_shifting=dynamic, time_shift_type=shift_type, gamma=gamma)
    amplify = amplify and kind == "dmd"
    reference = _oracle(config)
    ours = stage_schedules(config, replace(PYRAMID, steps=steps), tokens_per_stage=TOKENS, amplify=amplify)
    for stage in range(3):
        # The reference computes the shift before it enlarges the latents, so from the stage before.
        mu = calculate_shift(TOKENS[max(stage - 1, 0)])
        reference.set_timesteps(steps[stage], stage, mu=mu, is_amplify_first_chunk=amplify)
        np.testing.assert_allclose(ours[stage].timesteps, reference.timesteps.numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours[stage].sigmas, reference.sigmas.numpy(), rtol=0, atol=1e-12)
        assert ours[stage].ori_start_sigma == pytest.approx(reference.ori_start_sigmas[stage], abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("dynamic", [False, True])
def test_single_stage_schedule_equals_diffusers(steps: int, dynamic: bool) -> None:
    config = SchedulerConfig("unipc", stages=1, stage_range=(0, 1), use_dynamic_shifting=dynamic)
    reference = _oracle(config)
    sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1]
    reference.set_timesteps(steps, sigmas=sigmas, mu=calculate_shift(8640))
    ours = stage_schedules(config, Recipe("base", (steps,), 5.0), tokens_per_stage=(8640,))[0]
    np.testing.assert_allclose(ours.timesteps, reference.timesteps.numpy(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.sigmas, reference.sigmas.numpy(), rtol=0, atol=1e-12)


def test_documented_numbers_of_the_distilled_recipe() -> None:
    config = SchedulerConfig("dmd", use_dynamic_shifting=False, time_shift_type="linear")
    for steps, expected in (((2, 2, 2), [[999, 871], [743, 564], [385, 193]]), ((1, 1, 1), [[999], [743], [385]])):
        ours = stage_schedules(config, replace(PYRAMID, steps=steps), tokens_per_stage=TOKENS)
        assert [[int(t) for t in stage.timesteps] for stage in ours] == expected


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["unipc", "unipc", "euler", "dmd"]),
    order=st.integers(1, 3),
    solver_type=st.sampled_from(["bh1", "bh2"]),
    lower_order_final=st.booleans(),
    no_corrector=st.sampled_from([(), (0,), (1, 2)]),
    steps=st.integers(1, 9),
    stage=st.integers(0, 2),
    dynamic=st.booleans(),
)
def test_solver_equals_diffusers(
    kind, order, solver_type, lower_order_final, no_corrector, steps, stage, dynamic
) -> None:
    config = SchedulerConfig(
        kind,
        use_dynamic_shifting=dynamic,
        time_shift_type="linear",
        solver_order=order,
        solver_type=solver_type,
        # Order above one into sigma = 0 divides by a nearly infinite step in both implementations.
        lower_order_final=lower_order_final or order > 1,
        disable_corrector=no_corrector,
    )
    reference = _oracle(config)
    reference.set_timesteps(steps, stage, mu=calculate_shift(TOKENS[max(stage - 1, 0)]))
    schedule = stage_schedules(config, replace(PYRAMID, steps=(steps,) * 3), tokens_per_stage=TOKENS)[stage]
    generator = torch.Generator().manual_seed(steps)
    theirs = start = torch.randn(2, 3, 9, 2, 2, generator=generator)
    solver = make_solver(config, schedule, start, PATCH)
    for index, timestep in enumerate(reference.timesteps):
        velocity = torch.randn(start.shape, generator=generator)
        extra = {}
        if kind == "dmd":
            extra = {"cur_sampling_step": index, "dmd_noisy_tensor": start, "dmd_sigmas": reference.sigmas}
            extra |= {"dmd_timesteps": reference.timesteps, "all_timesteps": reference.timesteps}
        theirs = reference.step(velocity, timestep, theirs, return_dict=False, **extra)[0]
        solver.step(_as_rows(velocity))
        # float32 sums whose terms reach ten times the result.
        torch.testing.assert_close(solver.latents, theirs, rtol=1e-4, atol=1e-4)


def test_distilled_step_in_bfloat16_is_bit_equal() -> None:
    config = SchedulerConfig("dmd", use_dynamic_shifting=True, time_shift_type="linear")
    reference = _oracle(config)
    reference.set_timesteps(4, 2, mu=calculate_shift(TOKENS[1]))
    schedule = stage_schedules(config, replace(PYRAMID, steps=(4, 4, 4)), tokens_per_stage=TOKENS)[2]
    theirs = start = torch.randn(1, 16, 9, 4, 4).bfloat16()
    solver = make_solver(config, schedule, start, PATCH)
    for index, timestep in enumerate(reference.timesteps):
        velocity = torch.randn(start.shape).bfloat16()
        theirs = reference.step(
            velocity,
            timestep,
            theirs,
            return_dict=False,
            cur_sampling_step=index,
            dmd_noisy_tensor=start,
            dmd_sigmas=reference.sigmas,
            dmd_timesteps=reference.timesteps,
            all_timesteps=reference.timesteps,
        )[0]
        solver.step(_as_rows(velocity))
        ours = solver.result(velocity.dtype)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


def test_block_noise_equals_diffusers() -> None:
    case = oracle.random_case("mid", "t2v", 0)
    pipe = oracle.pipeline(case)
    shape = (1, 4, 9, 6, 10)
    with oracle.mended():
        expected = HeliosPyramidPipeline.sample_block_noise(
            pipe, *shape, device="cpu", generator=torch.Generator().manual_seed(3)
        )
    factor = pyramid.block_noise_factor(1 / 3)
    still = torch.zeros(*shape[:3], shape[3] // 2, shape[4] // 2)
    draws = NoiseSource(3).normal(4 * 9 * 3 * 5, 4)
    actual = pyramid.enlarge(still, draws, factor, alpha=1.0, beta=1.0, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_block_noise_has_the_covariance_it_should() -> None:
    gamma = 0.2
    still, draws = torch.zeros(1, 1, 1, 1, 200_000), NoiseSource(0).normal(200_000, 4)
    factor = pyramid.block_noise_factor(gamma)
    noise = pyramid.enlarge(still, draws, factor, alpha=1.0, beta=1.0, dtype=torch.float32)
    blocks = noise.view(2, 200_000, 2).permute(1, 0, 2).reshape(-1, 4)
    expected = torch.eye(4) * (1 + gamma) - gamma
    torch.testing.assert_close(blocks.T @ blocks / len(blocks), expected, rtol=0, atol=0.02)


def test_block_noise_factor_where_float32_cannot(monkeypatch) -> None:
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (original(matrix).L, torch.tensor(4)))
    factor = pyramid.block_noise_factor(1 / 3)
    covariance = torch.eye(4) * (4 / 3) - 1 / 3
    assert torch.isfinite(factor).all()
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=1e-6)


def test_shrunk_noise_keeps_its_variance() -> None:
    noise = NoiseSource(1).normal(1, 8, 9, 64, 64)
    small = pyramid.shrink_noise(noise, 3)
    assert small.shape == (1, 8, 9, 16, 16)
    assert small.std().item() == pytest.approx(1.0, abs=0.03)
    assert pyramid.shrink_noise(noise, 1) is noise


def test_enlarging_repeats_pixels_and_weighs_noise() -> None:
    latents, draws = NoiseSource(2).normal(1, 2, 3, 2, 3), NoiseSource(3).normal(1 * 2 * 3 * 2 * 3, 4)
    alpha, beta = pyramid.renoise_weights(0.66633, 1 / 3)
    assert (alpha, beta) == (pytest.approx(0.60012, abs=1e-5), pytest.approx(0.69261, abs=1e-5))
    factor = pyramid.block_noise_factor(1 / 3)
    zeros = torch.zeros_like(latents)
    noise = pyramid.enlarge(zeros, draws, factor, alpha=0.0, beta=1.0, dtype=torch.float32)
    out = pyramid.enlarge(latents, draws, factor, alpha=alpha, beta=beta, dtype=torch.float32)
    expected = alpha * latents.repeat_interleave(2, -1).repeat_interleave(2, -2) + beta * noise
    torch.testing.assert_close(out, expected)


def test_guidance_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(3, 20, 8, generator=generator) for _ in range(2))
    plain = guidance.combine(positive, negative, scale=5.0, zero_star=False)
    torch.testing.assert_close(plain, negative + 5.0 * (positive - negative))
    scale = optimized_scale(positive.flatten(1), negative.flatten(1)).view(3, 1, 1)
    star = guidance.combine(positive, negative, scale=5.0, zero_star=True)
    torch.testing.assert_close(star, negative * scale + 5.0 * (positive - negative * scale))
    same = guidance.combine(positive, positive, scale=5.0, zero_star=True)
    torch.testing.assert_close(same, positive)


def test_noise_state_continues_the_same_numbers() -> None:
    source = NoiseSource(7)
    source.normal(5)
    state = source.state()
    expected = source.normal(100)
    other = NoiseSource(0)
    other.restore(state)
    assert torch.equal(other.normal(100), expected)


@pytest.mark.parametrize("per_frame", [False, True])
def test_blending_follows_the_reference_draws(per_frame: bool) -> None:
    latents = torch.randn(1, 4, 9, 3, 3)
    generator = torch.Generator().manual_seed(11)
    sigma = torch.rand(9 if per_frame else 1, generator=generator) * (0.135 - 0.111) + 0.111
    noise = torch.randn(latents.shape, generator=generator)
    sigma = sigma.view(1, 1, -1, 1, 1)
    expected = sigma * noise + (1 - sigma) * latents
    assert torch.equal(blend_with_noise(latents, NoiseSource(11), (0.111, 0.135), per_frame=per_frame), expected)
    assert math.isclose(
        blend_with_noise(latents, NoiseSource(1), (0.0, 0.0), per_frame=False).sum(), latents.sum(), rel_tol=1e-4
    )
