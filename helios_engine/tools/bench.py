"""Where the time of a chunk goes: one forward per stage, the VAE, whole chunks."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from helios_engine.config import LATENT_FRAMES_PER_CHUNK
from helios_engine.engine.engine import Engine
from helios_engine.engine.history import History, stacked_window
from helios_engine.request import FRAMES_PER_CHUNK, VideoRequest


def time_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, the device drained before and after; one warm-up call is not counted."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    seconds = []
    for _ in range(repeats):
        drain()
        start = time.perf_counter()
        work()
        drain()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def hardware(device: torch.device) -> dict[str, object]:
    """What a figure was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def bench(engine: Engine, request: VideoRequest, *, repeats: int = 3) -> dict[str, object]:
    """Milliseconds per forward of each stage and per decode; seconds and frames per second of chunks, the first apart.

    A forward is one prompt's, without guidance. The request needs at least two chunks.
    """
    if request.num_chunks is None or request.num_chunks < 2:
        raise ValueError(f"bench needs at least two chunks (num_frames > {FRAMES_PER_CHUNK}), got {request.num_frames}")
    plan = engine.plan(request)
    channels = engine.checkpoint.model.in_channels
    session = engine.open(request)
    history = History.empty(channels, *plan.latent_size, engine.device)
    context = engine.transformer.prepare(stacked_window([history]), session.texts[:1])
    forwards = {}
    for size, tokens in zip(plan.stage_sizes, plan.tokens_per_stage, strict=True):
        latents = torch.randn(1, channels, LATENT_FRAMES_PER_CHUNK, *size).to(engine.device, engine.dtype)
        seconds = time_seconds(lambda x=latents: engine.transformer(x, 500.0, context), engine.device, repeats)
        forwards[f"{tokens}+{plan.history_tokens}"] = 1e3 * seconds
    latents = torch.randn(1, channels, LATENT_FRAMES_PER_CHUNK, *plan.latent_size).to(engine.device)
    decode = time_seconds(lambda: engine._frames.decode(latents, "uint8", FRAMES_PER_CHUNK), engine.device, repeats)
    timings = [chunk.timing for chunk in engine.stream(request)]
    totals = [timing.denoise_seconds + timing.decode_seconds for timing in timings]
    steady = statistics.median(totals[1:])
    return {
        **hardware(engine.device),
        **engine.describe(plan),
        "device": hardware(engine.device)["device"],
        "height": plan.height,
        "width": plan.width,
        "forward_ms": forwards,
        "decode_ms": 1e3 * decode,
        "first_chunk_s": totals[0],
        "chunk_s": steady,
        "denoise_s": statistics.median(t.denoise_seconds for t in timings[1:]),
        "frames_per_second": FRAMES_PER_CHUNK / steady,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(engine.device) if engine.device.type == "cuda" else None,
    }
