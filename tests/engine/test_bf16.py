"""bfloat16: our error against a float32 run, over Diffusers' own. Closeness to Diffusers would prove nothing here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from helios_engine import Engine, EngineConfig, VideoRequest
from tests.helpers import oracle

SEEDS = range(8)


@pytest.mark.parametrize(
    "variant", [pytest.param("base", marks=pytest.mark.full), pytest.param("mid", marks=pytest.mark.full), "distilled"]
)
def test_bf16_error_is_no_larger_than_diffusers(variant: str, tmp_path) -> None:
    case = replace(
        oracle.random_case(variant, "t2v", 2),
        num_chunks=1,
        height=64,
        width=64,
        steps=(6,) if variant == "base" else (3, 3, 3),
        guidance_scale=1.0 if variant == "distilled" else 3.0,
        dynamic_shifting=True,
        scheduler="dmd" if variant == "distilled" else "unipc",
    )
    model = {**case.model, "num_layers": 3, "is_amplify_history": False}
    case = replace(case, model=model)
    folder = oracle.save(oracle.pipeline(case), tmp_path / "checkpoint")
    pipe_class = type(oracle.pipeline(case))
    exact_pipe = pipe_class.from_pretrained(folder)
    pipe = pipe_class.from_pretrained(folder, torch_dtype=torch.bfloat16, vae=exact_pipe.vae)
    engine = Engine.load(folder, EngineConfig(device="cpu", dtype="bfloat16"))
    for reference in (pipe, exact_pipe):
        reference.set_progress_bar_config(disable=True)
    ratios = []
    for seed in SEEDS:
        seeded = replace(case, seed=seed)
        exact = oracle.run(exact_pipe, seeded).latents
        theirs = (oracle.run(pipe, seeded).latents - exact).norm()
        arguments = oracle.request_arguments(seeded)
        ours = (engine.generate(VideoRequest(**arguments)).latents - exact).norm()
        assert 0 < theirs < 0.5 * exact.norm()
        ratios.append((ours / theirs).item())
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert mean <= 1.1, ratios
    assert max(ratios) <= 1.5, ratios
