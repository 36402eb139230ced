"""Parts of gpu_check.py about settings that trade something: offload (speed for memory) and quality (numbers for speed)."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from helios_engine import Engine, EngineConfig, VideoRequest
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.memory import estimate_memory
from helios_engine.engine.plan import plan_for
from helios_engine.model.weights import save_safetensors
from helios_engine.request import VideoChunk
from helios_engine.tools.toy import _as_json, _write_json

APPROXIMATIONS: dict[str, dict[str, object]] = {
    "history_refresh 2": {"history_refresh": 2},
    "block_cache 0.1": {"block_cache": 0.1},
    "fp8": {"fp8": True},
    "fa3_fp8": {"attention_backend": "fa3_fp8"},
    "high": {"quality": "high"},
    "fast": {"quality": "fast"},
}


def write_checkpoint(engine: Engine, folder: Path) -> None:
    """An engine's random weights as a Diffusers-layout checkpoint without a text encoder, a file per block."""
    index = {
        "_class_name": "HeliosPyramidPipeline",
        "is_distilled": True,
        "transformer": ["diffusers", "HeliosTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "scheduler": ["diffusers", "HeliosDMDScheduler"],
    }
    _write_json(folder / "model_index.json", index)
    scheduler = {
        "_class_name": "HeliosDMDScheduler",
        "stages": 3,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name, config in (("transformer", engine.checkpoint.model), ("vae", engine.checkpoint.vae)):
        _write_json(folder / name / "config.json", _as_json(config))
    slots = engine.transformer.checkpoint_slots()
    weight_map = {name: f"{_shard(name)}.safetensors" for name in slots}
    for shard in sorted(set(weight_map.values())):
        part = {name: slots[name].cpu() for name in slots if weight_map[name] == shard}
        save_safetensors(folder / "transformer" / shard, part, {"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    vae = {name: tensor.cpu() for name, tensor in engine.vae.checkpoint_slots().items()}
    save_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, {"format": "pt"})


def _shard(name: str) -> str:
    parts = name.split(".")
    return f"block_{int(parts[1]):03d}" if parts[0] == "blocks" else "other"


def anonymous_gb() -> float:
    """Host memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e6


OFFLOADS: dict[str, dict[str, object]] = {
    "resident": {},
    "group": {"offload": "group"},
    "group by leaves, bf16 VAE": {
        "offload": "group",
        "offload_level": "leaf",
        "offload_ahead": 3,
        "vae_dtype": "bfloat16",
    },
    "model": {"offload": "model"},
}


def offload_figures(
    make_engine: Callable[[], Engine], request: VideoRequest, device: torch.device
) -> dict[str, object]:
    """Seconds per chunk, peak memory and what was predicted, with weights resident, streamed and taking turns."""
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine()
        write_checkpoint(engine, Path(folder))
        del engine
        latents: dict[str, Tensor] = {}
        for name, settings in OFFLOADS.items():
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            config = EngineConfig(device=str(device), dtype="bfloat16", **settings)
            checkpoint = Checkpoint.open(folder)
            predicted = estimate_memory(checkpoint, plan_for(checkpoint, request), config, 512).peak
            before = anonymous_gb()
            engine = Engine.load(folder, config)
            arrivals, chunks = stream_arrivals(engine, request)
            latents[name] = torch.cat([chunk.latents.cpu() for chunk in chunks], dim=2)
            figures = {
                "first_chunk_s": arrivals[1] - arrivals[0],
                "chunk_s": arrivals[-1] - arrivals[-2],
                "host_anonymous_gb": anonymous_gb() - before,
                "predicted_gb": predicted / 1e9,
            }
            if device.type == "cuda":
                figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                figures["predicted_over_peak"] = figures["predicted_gb"] / figures["peak_gb"]
            result[name] = {**figures, "equal to resident": bool(torch.equal(latents[name], latents["resident"]))}
            engine.close()
            del engine, chunks
    return result


def stream_arrivals(engine: Engine, request: VideoRequest) -> tuple[list[float], list[VideoChunk]]:
    """When the prompt was encoded and when each chunk arrived, and the chunks."""
    with engine.stream(request) as stream:
        arrivals, chunks = [time.perf_counter()], []
        for chunk in stream:
            arrivals.append(time.perf_counter())
            chunks.append(chunk)
    return arrivals, chunks


def quality_figures(make_engine: Callable[..., Engine], request: VideoRequest) -> dict[str, object]:
    """PSNR against exact and seconds per chunk of each approximation; random weights say nothing about how it looks."""
    exact, frames, seconds = _run(make_engine(), request)
    result: dict[str, object] = {"exact": {"chunk_s": seconds}}
    for name, settings in APPROXIMATIONS.items():
        try:
            gc.collect()  # the engine before
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            latents, approximate, own = _run(make_engine(**settings), request)
        except ValueError as error:
            result[name] = str(error)
            continue
        result[name] = {
            "chunk_s": own,
            "faster": seconds / own,
            "psnr_latents_db": psnr(latents, exact, (exact.max() - exact.min()).item()),
            "psnr_frames_db": psnr(approximate, frames, 255.0),
        }
    return result


def _run(engine: Engine, request: VideoRequest) -> tuple[Tensor, Tensor, float]:
    next(iter(engine.stream(request)))  # warms up
    chunks = list(engine.stream(request))
    latents = torch.cat([chunk.latents.cpu() for chunk in chunks], dim=2)
    frames = torch.cat([torch.as_tensor(chunk.frames).float() for chunk in chunks])
    return latents, frames, sum(chunk.timing.denoise_seconds for chunk in chunks) / len(chunks)


def psnr(actual: Tensor, exact: Tensor, peak: float) -> float:
    """Decibels; infinite where both are equal."""
    error = (actual - exact).square().mean().item()
    return 10 * math.log10(peak**2 / error) if error else math.inf
