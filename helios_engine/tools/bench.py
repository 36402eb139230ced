"""Where the time of a chunk goes (one forward per stage, the VAE, whole chunks), and what ranks send each other."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from helios_engine.config import LATENT_FRAMES_PER_CHUNK
from helios_engine.engine.engine import Engine
from helios_engine.engine.history import History, stacked_window
from helios_engine.engine.plan import Plan
from helios_engine.parallel import launch
from helios_engine.request import FRAMES_PER_CHUNK, VideoRequest
from helios_engine.settings import EngineConfig, ParallelConfig
from helios_engine.tools import profile
from helios_engine.tools.generate import check_ranks, fields_of, plan_request, with_single_operators

PROMPT = "A red fox runs through fresh snow."


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


def run(options: Namespace, meeting: launch.Meeting) -> int:
    """The bench command: on one rank, or on several that share every forward; rank 0 prints."""

    def prepare() -> tuple[VideoRequest, EngineConfig, ParallelConfig, bool]:
        if options.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {options.repeats}")
        request = VideoRequest(**{"prompt": PROMPT, **fields_of(options, VideoRequest)})
        config = EngineConfig(**fields_of(options, EngineConfig))
        parallel = ParallelConfig(**fields_of(options, ParallelConfig))
        _, plan = plan_request(options.model, request, config)
        check_ranks(options.num_gpus, parallel, config, guided=plan.is_guided)
        if not (options.bytes or options.trace):
            _check_length(request)
        if options.timeline is not None and not options.timeline.endswith(".png"):
            raise ValueError(f"timeline {options.timeline} must end in .png")
        if (options.timeline is not None) + options.bytes + options.trace > 1:
            raise ValueError("bytes, timeline and trace are questions of their own; ask one at a time")
        if options.trace and max(options.num_gpus, launch.world_size()) > 1:
            raise ValueError(f"trace is of one rank, got num-gpus {options.num_gpus}; leave it out")
        if options.timeline is not None:
            config = with_single_operators(config)
        if options.num_gpus == 1 or launch.world_size() > 1:
            config = dataclasses.replace(config, device=launch.own_device(config.device))
        return request, config, parallel, plan.is_guided

    request, config, parallel, is_guided = meeting.agreed(
        prepare, lambda found: {"device": found[1].device.partition(":")[0]}
    )
    if options.trace:
        print(json.dumps(trace(options.model, request, config), indent=2))
        return 0
    if options.num_gpus > 1 and launch.world_size() == 1:
        return launch.start_ranks(options.num_gpus, options.arguments)
    context = meeting.start(parallel, device=config.device, guided=is_guided)
    try:
        # Closed before the ranks' groups are taken down: recorded steps refer to them.
        with contextlib.closing(Engine.load(options.model, config, context)) as engine, context.guard():
            if options.bytes:
                found = count_bytes(engine, request)
            elif options.timeline:
                found = timeline(engine, request, Path(options.timeline))
            else:
                found = bench(engine, request, repeats=options.repeats)
        if context.is_first:
            print(json.dumps(found, indent=2))
    finally:
        context.close()
        if not (context.is_broken or context.is_interrupted):
            launch.stop()
    return 0


def trace(model: str, request: VideoRequest, config: EngineConfig) -> dict[str, object]:
    """Launches and bytes of a forward of each stage and of a decode, from the checkpoint's configuration alone."""
    from helios_engine.tools.launches import trace_checkpoint

    checkpoint, plan = plan_request(model, request, config)
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    return {
        "model": checkpoint.name,
        "size": f"{plan.height}x{plan.width}",
        **trace_checkpoint(
            checkpoint.model,
            checkpoint.vae,
            plan.stage_sizes,
            dtype=dtype,
            vae_dtype=getattr(torch, config.vae_dtype),
        ),
    }


@torch.no_grad()
def timeline(engine: Engine, request: VideoRequest, path: Path) -> dict[str, object]:
    """Draw the second chunk of rank 0 as a PNG and return milliseconds per category."""
    found: list[profile.Timeline] = []
    with engine.stream(request) as stream:
        chunks = profile.profiled(stream, 1, lambda profiler: found.append(profile.timeline_of(profiler)))
        for _ in range(2):
            next(chunks)
    if engine.context.is_first:
        profile.draw_timeline(found[0], path)
    totals = {name: round(value, 3) for name, value in found[0].milliseconds().items()}
    return {**hardware(engine.device), "timeline": str(path), "chunk_ms": found[0].duration / 1e3, "ms": totals}


@torch.no_grad()
def count_bytes(engine: Engine, request: VideoRequest) -> dict[str, object]:
    """Bytes each rank sends, and collective calls, in one forward of each stage, by purpose: one object per rank.

    A forward is one prompt's; with cfg degree 2 it is both branches', one on each half of the ranks.
    """
    plan = engine.plan(request)
    result = {}
    for tokens, forward in _forwards(engine, request, plan):
        traffic = engine.context.traffic
        traffic.bytes_sent.clear()
        traffic.calls.clear()
        forward()
        own = {"bytes": {**traffic.bytes_sent, "total": traffic.bytes_sent.total()}, "calls": dict(traffic.calls)}
        result[tokens] = [json.loads(text) for text in engine.context.exchange_text(json.dumps(own))]
    return {"ranks": engine.context.describe(), "dtype": str(engine.dtype), "sent_per_forward": result}


def _forwards(engine: Engine, request: VideoRequest, plan: Plan) -> Iterator[tuple[str, Callable[[], object]]]:
    """("noisy+history tokens", a call that runs one forward) of each stage."""
    channels = engine.checkpoint.model.in_channels
    session = engine.open(request)
    history = History.empty(channels, *plan.latent_size, engine.device)
    context = engine.transformer.prepare(stacked_window([history]), session.texts[:1])
    for size, tokens in zip(plan.stage_sizes, plan.tokens_per_stage, strict=True):
        latents = torch.randn(1, channels, LATENT_FRAMES_PER_CHUNK, *size).to(engine.device, engine.dtype)
        yield f"{tokens}+{plan.history_tokens}", lambda x=latents: engine.transformer(x, 500.0, context)


def _check_length(request: VideoRequest) -> None:
    if request.num_chunks is None or request.num_chunks < 2:
        raise ValueError(f"bench needs at least two chunks (num_frames > {FRAMES_PER_CHUNK}), got {request.num_frames}")


@torch.no_grad()
def bench(engine: Engine, request: VideoRequest, *, repeats: int = 3) -> dict[str, object]:
    """Milliseconds per forward of each stage and per decode; seconds and frames per second of chunks, the first apart.

    Chunks are timed from one's arrival to the next one's, as a caller sees them, the first from the encoded prompt.
    A forward is one prompt's, without guidance. The request needs at least two chunks.
    """
    _check_length(request)
    plan = engine.plan(request)
    forwards = {
        tokens: 1e3 * time_seconds(forward, engine.device, repeats)
        for tokens, forward in _forwards(engine, request, plan)
    }
    latents = torch.randn(1, engine.checkpoint.model.in_channels, LATENT_FRAMES_PER_CHUNK, *plan.latent_size)
    latents = latents.to(engine.device)
    decode = time_seconds(lambda: engine._frames.decode(latents, "uint8", FRAMES_PER_CHUNK), engine.device, repeats)
    with engine.stream(request) as stream:
        arrivals, timings = [time.perf_counter()], []
        for chunk in stream:
            arrivals.append(time.perf_counter())
            timings.append(chunk.timing)
    totals = [after - before for before, after in itertools.pairwise(arrivals)]
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
