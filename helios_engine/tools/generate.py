"""The generate command: check everything on every rank, start ranks where asked, make the video, write it on rank 0."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helios_engine.engine import conditioning
from helios_engine.engine.checkpoint import Checkpoint
from helios_engine.engine.devices import resolve_device, resolve_dtype
from helios_engine.engine.engine import Engine
from helios_engine.engine.memory import estimate_memory
from helios_engine.engine.plan import Plan, plan_for
from helios_engine.engine.recording import Recording, RecordingWriter
from helios_engine.engine.session import VideoSession, VideoStream
from helios_engine.engine.state import SessionState
from helios_engine.output import BackgroundWriter, check_output, open_writer, temporary_name, video_metadata
from helios_engine.parallel import launch
from helios_engine.parallel.context import ContextParallel
from helios_engine.parallel.mesh import Degrees
from helios_engine.parallel.watch import RankFailure
from helios_engine.request import VideoChunk, VideoRequest
from helios_engine.settings import EngineConfig, ParallelConfig, describe_approximations
from helios_engine.tools import profile


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the command, checked. recording is rank 0's alone."""

    options: Namespace
    request: VideoRequest
    config: EngineConfig
    parallel: ParallelConfig
    checkpoint: Checkpoint
    plan: Plan
    degrees: Degrees
    recording: Recording | None


def generate(options: Namespace, meeting: launch.Meeting) -> int:
    """Run the command; returns the exit code."""
    job = meeting.agreed(lambda: prepare(options), lambda job: {"device": job.config.device.partition(":")[0]})
    if options.dry_run:
        if launch.own_rank() == 0:
            _print_plan(job)
        return 0
    if options.num_gpus > 1 and launch.world_size() == 1:
        with _stopped_by_hand(job):
            return launch.start_ranks(options.num_gpus, options.arguments)
        return 0 if Path(options.output).exists() else 1
    context = meeting.start(job.parallel, device=job.config.device, guided=job.plan.is_guided)
    first_process = context.word(os.getpid())
    try:
        with _interrupts_noted(context):
            return _write_video(job, context)
    except (RankFailure, KeyboardInterrupt) as error:
        # When a rank dies, torchrun stops the others with the signal that also means "end, please".
        failure = error if isinstance(error, RankFailure) else context.cause_of_stop()
        if failure is None:
            raise
        if failure.rank == 0:  # killed, it could not tidy up
            temporary_name(Path(options.output), first_process).unlink(missing_ok=True)
        raise failure from None
    finally:
        context.close()
        if not (context.is_broken or context.is_interrupted):  # else the group would wait for exchanges nobody joins
            launch.stop()


def prepare(options: Namespace) -> Job:
    """Everything checked that can be without weights. Raises ValueError."""
    request, config = VideoRequest(**fields_of(options, VideoRequest)), EngineConfig(**fields_of(options, EngineConfig))
    parallel = ParallelConfig(**fields_of(options, ParallelConfig))
    check_output(options.output, options.encoder, height=request.height, width=request.width)
    if request.num_frames is None and options.output.endswith(".safetensors"):
        raise ValueError("an endless video's latents cannot be held for one .safetensors file; use .mp4 or .npy")
    if options.resume and options.checkpoint_dir is None:
        raise ValueError("resume needs checkpoint-dir, the folder of the run to go on with")
    checkpoint, plan = plan_request(options.model, request, config)
    _check_profile(options, plan)
    if options.profile is not None:
        config = with_single_operators(config)
    degrees = check_ranks(options.num_gpus, parallel, config, guided=plan.is_guided)
    conditioning.load_pixels(request)
    recording = None
    if options.checkpoint_dir is not None and launch.own_rank() == 0:
        facts = _recording_facts(request, config, checkpoint, options.encoder)
        recording = Recording(options.checkpoint_dir, facts, output=options.output, resume=options.resume)
    starts_ranks = options.num_gpus > 1 and launch.world_size() == 1
    if not (options.dry_run or starts_ranks):
        config = dataclasses.replace(config, device=launch.own_device(config.device))
    return Job(options, request, config, parallel, checkpoint, plan, degrees, recording)


def plan_request(model: str, request: VideoRequest, config: EngineConfig) -> tuple[Checkpoint, Plan]:
    """The checkpoint's configuration and what it makes of a request."""
    checkpoint = Checkpoint.open(model, config.revision)
    return checkpoint, plan_for(checkpoint, request)


def with_single_operators(config: EngineConfig) -> EngineConfig:
    """For profiles: a recorded forward would be one piece of work, so none is recorded unless that was asked for."""
    return config if config.cuda_graphs is not None else dataclasses.replace(config, cuda_graphs=False)


def check_ranks(num_gpus: int, parallel: ParallelConfig, config: EngineConfig, *, guided: bool) -> Degrees:
    """The degrees for the ranks that run or would be started. Raises ValueError where they do not fit."""
    if num_gpus < 1:
        raise ValueError(f"num-gpus must be at least 1, got {num_gpus}")
    if launch.world_size() > 1 and num_gpus not in (1, launch.world_size()):
        raise ValueError(f"num-gpus {num_gpus} under torchrun, which started {launch.world_size()} ranks; leave it out")
    num_ranks = max(num_gpus, launch.world_size())
    degrees = launch.choose_degrees(parallel, num_ranks, guided=guided)
    if degrees.cfg > 1 and not guided:
        raise ValueError("cfg-degree 2 needs a guidance scale above 1")
    if launch.world_size() == 1 and num_gpus > 1 and resolve_device(config.device).type == "cuda":
        launch.check_gpus(num_gpus)
    return degrees


def fields_of(options: Namespace, cls: type) -> dict[str, object]:
    """The options that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(options).items() if name in names}


def _check_profile(options: Namespace, plan: Plan) -> None:
    if options.profile is None:
        if options.profile_chunk is not None:
            raise ValueError("profile-chunk needs profile, the file to write the trace to")
        return
    profile.check_trace(options.profile)
    if options.profile_chunk is None:
        options.profile_chunk = 0 if plan.num_chunks == 1 else 1
    num_chunks = plan.num_chunks
    if options.profile_chunk < 0 or (num_chunks is not None and options.profile_chunk >= num_chunks):
        last = "without end" if num_chunks is None else f"to {num_chunks - 1}"
        raise ValueError(f"profile-chunk {options.profile_chunk}: the video has chunks 0 {last}")


def _profiled(job: Job, context: ContextParallel, stream: VideoStream) -> Iterator[VideoChunk]:
    """The stream's chunks, one of them made under the profiler; counted from where the stream begins."""
    path = profile.trace_path(Path(job.options.profile), context.rank, context.size)
    return profile.profiled(stream, job.options.profile_chunk, lambda found: profile.write_trace(found, path))


def _recording_facts(
    request: VideoRequest, config: EngineConfig, checkpoint: Checkpoint, encoder: str
) -> dict[str, str]:
    """What a resumed run must have in common with the run it goes on with; the device and the ranks may change."""
    numbers = {"dtype": str(resolve_dtype(config)), "vae_dtype": config.vae_dtype}
    numbers["approximations"] = describe_approximations(config)
    model = {"model": checkpoint.name, "variant": checkpoint.recipe.variant, "encoder": encoder}
    return {**request.facts(), **model, **numbers}


def _write_video(job: Job, context: ContextParallel) -> int:
    """Load, generate, and on rank 0 write the file."""
    options = job.options
    quiet = options.quiet or not context.is_first
    # Closed before the ranks' groups are taken down: recorded steps refer to them.
    with contextlib.closing(Engine.load(options.model, job.config, context)) as engine:
        if context.size > 1 and not quiet:
            print(context.describe(), file=sys.stderr)
        kept = context.share_bytes(b"" if job.recording is None else job.recording.state_bytes or b"")
        source = SessionState.from_bytes(kept) if kept else job.request
        if kept and not quiet:
            print(f"going on after chunk {source.index} of {options.checkpoint_dir}", file=sys.stderr)
        with engine.stream(source, progress=not quiet) as stream:
            chunks = stream if options.profile is None else _profiled(job, context, stream)
            if not context.is_first:
                with _stopped_by_hand(job):
                    for _ in chunks:
                        pass
                return 0
            with _open_writer(job, engine, stream.session) as writer, _stopped_by_hand(job):
                for chunk in chunks:
                    writer.write(chunk)
    print(options.output)
    return 0


@contextlib.contextmanager
def _interrupts_noted(context: ContextParallel) -> Iterator[None]:
    """An interrupt may arrive at any line; the context must know before anything is tidied up with the other ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        context.interrupt()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stopped_by_hand(job: Job) -> contextlib.AbstractContextManager[None]:
    """Stopping an endless video by hand is its normal end, so its file is kept."""
    return contextlib.suppress(KeyboardInterrupt) if job.request.num_frames is None else contextlib.nullcontext()


def _open_writer(job: Job, engine: Engine, session: VideoSession) -> BackgroundWriter | RecordingWriter:
    options, request = job.options, job.request
    metadata = video_metadata(request, engine.describe(session.plan))
    if job.recording is None:
        writer = open_writer(options.output, fps=request.fps, metadata=metadata, encoder=options.encoder)
        return BackgroundWriter(writer)
    return RecordingWriter(
        job.recording,
        options.output,
        state=session.state,
        fps=request.fps,
        metadata=metadata,
        encoder=options.encoder,
    )


def _print_plan(job: Job) -> None:
    """What would be computed, for --dry-run."""
    checkpoint, plan, request, config, degrees = job.checkpoint, job.plan, job.request, job.config, job.degrees
    memory = estimate_memory(checkpoint, plan, config, request.max_sequence_length, num_ranks=degrees.num_ranks)
    recipe = plan.recipe
    chunks = "endless" if plan.num_chunks is None else f"{plan.num_chunks} chunks of 33"
    forwards = [
        sum(
            (2 if plan.is_guided else 1)
            for stage, schedule in enumerate(plan.chunk_schedules(index))
            for step in range(schedule.num_steps)
            if not plan.holds_still(stage, step)
        )
        for index in (0, 1)
    ]
    guidance = f"{recipe.guidance_scale:g}" + (" (CFG-Zero*)" if recipe.cfg_zero_star and plan.is_guided else "")
    print(
        f"model       {checkpoint.name}, {recipe.variant}, {resolve_dtype(config)} on {resolve_device(config.device)}"
    )
    print(
        f"video       {plan.num_frames or 'endless'} frames ({chunks}), {plan.height}x{plan.width}, {request.fps} fps"
    )
    print(
        f"recipe      steps {','.join(map(str, recipe.steps))}, guidance {guidance}, {checkpoint.scheduler.scheduler_type}"
    )
    if (approximations := describe_approximations(config)) != "none":
        print(f"approximate {approximations}")
    print(f"forwards    {forwards[0]} in the first chunk, {forwards[1]} in each later one")
    for size, tokens in zip(plan.stage_sizes, plan.tokens_per_stage, strict=True):
        print(f"stage       latents 9x{size[0]}x{size[1]}, {tokens} noisy + {plan.history_tokens} history tokens")
    if degrees.num_ranks > 1:
        print(f"ranks       {degrees.num_ranks}: {degrees.describe()}")
    print(
        f"memory      about {memory.peak / 1e9:.2f} GB: transformer {memory.transformer / 1e9:.2f}"
        + (f" and {memory.transformer_slots / 1e9:.2f} for blocks in turn" if memory.transformer_slots else "")
        + ", text encoder "
        + f"{memory.text_encoder / 1e9:.2f}, VAE {memory.vae / 1e9:.2f}, prompt {memory.text_keys_values / 1e9:.2f}, "
        f"working set {max(memory.denoise_activations, memory.decode_activations) / 1e9:.2f}"
    )
