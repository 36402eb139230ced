"""Whole videos against Diffusers: every variant and task, random configurations, float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helios_engine import Engine, EngineConfig, VideoRequest
from tests.helpers import oracle

# The promise made to users: 1e-4 on frames in [0, 1]. Latents span about +-4 and get the same bound.
TOLERANCE = 1e-4
CPU = EngineConfig(device="cpu", dtype="float32")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 13))])
@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v"])
@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_video_equals_diffusers(variant: str, task: str, seed: int, tmp_path) -> None:
    case = oracle.random_case(variant, task, seed)
    pipe = oracle.pipeline(case)
    expected = oracle.run(pipe, case)
    engine = Engine.load(oracle.save(pipe, tmp_path / "checkpoint"), CPU)
    assert engine.checkpoint.recipe.variant == variant
    video = engine.generate(VideoRequest(**oracle.request_arguments(case)))
    assert torch.isfinite(expected.latents).all()
    assert expected.latents.std() > 0.1
    assert expected.frames.std() > 0.05
    latent_error = (video.latents - expected.latents).abs().max().item()
    frame_error = np.abs(video.frames - expected.frames).max()
    assert latent_error <= TOLERANCE, (case, latent_error)
    assert frame_error <= TOLERANCE, (case, frame_error)
