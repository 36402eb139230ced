"""Whole chunks and single forwards, ours against Diffusers, on the same checkpoint in one process.

    helios-engine toy /path/to/toy
    python benchmarks/bench_engine.py --model /path/to/toy/distilled --height 128 --width 192 --output engine.json

Seconds per chunk are end to end: denoising, decoding, frames on the host as uint8 (ours) or float (Diffusers' "np").
Text encoding and loading are left out on both sides. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.config import LATENT_FRAMES_PER_CHUNK
from helios_engine.engine.history import History, stacked_window
from helios_engine.engine.plan import Plan
from helios_engine.model import rope
from helios_engine.tools.bench import hardware, time_seconds
from tests.helpers.oracle import mended


def load_diffusers(model: str, engine: Engine):
    """The reference pipeline with the same numbers: fp32 VAE, the engine's dtype elsewhere."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = DiffusionPipeline.from_pretrained(model, vae=vae, torch_dtype=engine.dtype).to(engine.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def forward_seconds(engine: Engine, pipe, plan: Plan, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of one forward of one prompt at every stage: {"540+2400": {"ours": ..., "diffusers": ...}}."""
    device, dtype, channels = engine.device, engine.dtype, engine.checkpoint.model.in_channels
    embeds = torch.randn(1, 512, engine.checkpoint.model.text_dim).to(device, dtype)
    history = History.empty(channels, *plan.latent_size, device)
    window = stacked_window([history])
    context = engine.transformer.prepare(window, (engine.transformer.encode_text(embeds),))
    reference_history = {}
    for name, frames in (("short", rope.SHORT_FRAMES), ("mid", rope.MID_FRAMES), ("long", rope.LONG_FRAMES)):
        reference_history[f"latents_history_{name}"] = getattr(window, name).to(dtype)
        reference_history[f"indices_latents_history_{name}"] = torch.tensor([frames])
    result = {}
    for size, tokens in zip(plan.stage_sizes, plan.tokens_per_stage, strict=True):
        latents = torch.randn(1, channels, LATENT_FRAMES_PER_CHUNK, *size).to(device, dtype)

        def theirs(x: torch.Tensor = latents) -> None:
            pipe.transformer(
                hidden_states=x,
                timestep=torch.full((1,), 500, device=device),
                encoder_hidden_states=embeds,
                indices_hidden_states=torch.tensor([rope.CHUNK_FRAMES]),
                **reference_history,
            )

        result[f"{tokens}+{plan.history_tokens}"] = {
            "ours": time_seconds(lambda x=latents: engine.transformer(x, 500.0, context), device, repeats),
            "diffusers": time_seconds(theirs, device, repeats),
        }
    return result


def chunk_seconds(engine: Engine, pipe, request: VideoRequest, plan: Plan, repeats: int) -> dict[str, float]:
    """Median seconds per chunk over whole videos; the first video of each side warms up."""
    recipe, chunks = plan.recipe, plan.num_chunks
    embeds = {"prompt_embeds": engine.text_encoder.encode(request.prompt, max_length=512)}
    call = {
        **embeds,
        "height": plan.height,
        "width": plan.width,
        "num_frames": request.num_frames,
        "guidance_scale": recipe.guidance_scale,
    }
    if plan.is_guided:
        call["negative_prompt_embeds"] = engine.text_encoder.encode("", max_length=512)
    if recipe.num_stages == 1:
        call["num_inference_steps"] = recipe.steps[0]
    else:
        call["pyramid_num_inference_steps_list"] = list(recipe.steps)
        call["is_amplify_first_chunk"] = recipe.amplify_first_chunk

    def theirs() -> None:
        with mended():
            pipe(generator=torch.Generator().manual_seed(request.seed), **call)

    device = engine.device
    ours, reference = [], []
    for turn in range(repeats + 1):
        for seconds, work in ((ours, lambda: engine.generate(request)), (reference, theirs)):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds.append((time.perf_counter() - start) / chunks)
    return {"ours": statistics.median(ours), "diffusers": statistics.median(reference)}


@torch.no_grad()
def compare(options: argparse.Namespace) -> dict[str, object]:
    engine = Engine.load(options.model, EngineConfig(device=options.device, dtype=options.dtype))
    steps = tuple(int(step) for step in options.steps.split(",")) if options.steps else None
    request = VideoRequest(
        prompt="A red fox runs through fresh snow at sunrise.",
        num_frames=33 * options.chunks,
        height=options.height,
        width=options.width,
        steps=steps,
    )
    plan = engine.plan(request)
    pipe = load_diffusers(options.model, engine)
    forwards = forward_seconds(engine, pipe, plan, options.repeats)
    chunks = chunk_seconds(engine, pipe, request, plan, options.repeats)
    return {
        **engine.describe(plan),
        **hardware(engine.device),
        "height": plan.height,
        "width": plan.width,
        "chunks": options.chunks,
        "seconds_per_forward": {
            name: {**pair, "diffusers_over_ours": pair["diffusers"] / pair["ours"]} for name, pair in forwards.items()
        },
        "seconds_per_chunk": {**chunks, "diffusers_over_ours": chunks["diffusers"] / chunks["ours"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--steps", help="such as 2,2,2; the recipe's by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = compare(options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
