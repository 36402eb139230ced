"""Whole chunks and single forwards, ours against Diffusers, on the same checkpoint in one process.

    helios-engine toy /path/to/toy
    python -m benchmarks.bench_engine --model /path/to/toy/distilled --height 128 --width 192 --output engine.json
    python -m benchmarks.bench_engine --real-width 2 --dtype bfloat16 --height 128 --width 192 --steps 1,1,1

--real-width N makes a model of its own for the run: the 14 B model's width and VAE, random weights, N blocks.

Seconds per chunk are end to end: denoising, decoding, frames on the host as uint8 (ours) or float (Diffusers' "np").
Text encoding and loading are left out on both sides. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.gpu_modes import write_checkpoint
from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.config import LATENT_FRAMES_PER_CHUNK, ModelConfig, Recipe, SchedulerConfig, VaeConfig
from helios_engine.engine.checkpoint import Checkpoint, make_transformer
from helios_engine.engine.history import History, stacked_window
from helios_engine.engine.plan import Plan
from helios_engine.model import rope
from helios_engine.model.transformer import init_random_
from helios_engine.model.vae import VideoAutoencoder
from helios_engine.tools.bench import hardware, time_seconds
from helios_engine.tools.toy import init_vae_
from tests.helpers.oracle import mended


def load_diffusers(model: str, engine: Engine):
    """The reference pipeline with the same numbers: fp32 VAE, the engine's dtype elsewhere."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    absent = {} if engine.text_encoder is not None else {"text_encoder": None, "tokenizer": None}
    pipe = DiffusionPipeline.from_pretrained(model, vae=vae, torch_dtype=engine.dtype, **absent).to(engine.device)
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
    embeds = {"prompt_embeds": request.prompt_embeds}
    if engine.text_encoder is not None:
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


def _prompt(engine: Engine) -> dict[str, object]:
    if engine.text_encoder is not None:
        return {"prompt": "A red fox runs through fresh snow at sunrise."}
    return {"prompt_embeds": torch.randn(1, 512, engine.checkpoint.model.text_dim, dtype=engine.dtype)}


def write_real_width(folder: Path, num_blocks: int) -> None:
    """A Distilled checkpoint of the 14 B model's width with random bfloat16 weights and few blocks."""
    scheduler = SchedulerConfig("dmd", use_dynamic_shifting=True, time_shift_type="linear")
    recipe = Recipe.for_checkpoint({"_class_name": "HeliosPyramidPipeline", "is_distilled": True}, scheduler, "random")
    model, vae_config, device = ModelConfig(num_layers=num_blocks), VaeConfig(), torch.device("cpu")
    checkpoint = Checkpoint("random", folder, model, vae_config, scheduler, recipe, has_text_encoder=False)
    transformer, vae = make_transformer(model, device, torch.bfloat16), VideoAutoencoder(vae_config)
    init_random_(transformer, 0)
    init_vae_(vae, 0)
    config = EngineConfig(device="cpu", dtype="bfloat16")
    write_checkpoint(Engine(checkpoint, transformer=transformer, vae=vae, text_encoder=None, config=config), folder)


@torch.no_grad()
def compare(options: argparse.Namespace) -> dict[str, object]:
    engine = Engine.load(options.model, EngineConfig(device=options.device, dtype=options.dtype))
    steps = tuple(int(step) for step in options.steps.split(",")) if options.steps else None
    request = VideoRequest(
        **_prompt(engine),
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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--real-width", type=int, metavar="N")
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--steps", help="such as 2,2,2; the recipe's by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.real_width is not None:
            write_real_width(Path(folder), options.real_width)
            options.model = folder
        result = compare(options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
