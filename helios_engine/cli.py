"""helios-engine: generate, convert, inspect, toy, bench. Flags are the fields of EngineConfig and VideoRequest.

Bad input ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helios_engine.config import EngineConfig, ParallelConfig
from helios_engine.parallel import launch
from helios_engine.request import VideoRequest

if TYPE_CHECKING:
    from helios_engine.engine.checkpoint import Checkpoint
    from helios_engine.engine.plan import Plan
    from helios_engine.parallel.context import ContextParallel, Degrees

PROGRAM = "helios-engine"
BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a bad flag as one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message}; see {self.prog} --help")
        raise SystemExit(BAD_INPUT)


def _complain(message: str) -> None:
    if not launch.is_first_rank():  # all ranks find the same fault; one says it
        return
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    if threading.current_thread() is threading.main_thread():
        # A polite kill ends like Ctrl-C, so that no temporary file stays behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options)
    except ValueError as error:
        _complain(str(error))
        return BAD_INPUT
    except OSError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("stopped")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Generate video with Helios checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    generate = _command(commands, "generate", _generate, "make a video from a prompt, an image or a clip")
    _add_model(generate)
    generate.add_argument("--output", default="output.mp4", help=".mp4, .npy (frames) or .safetensors (latents)")
    generate.add_argument(
        "--encoder", default="libx264", help="FFmpeg encoder for .mp4, such as h264_nvenc (default: %(default)s)"
    )
    generate.add_argument("--dry-run", action="store_true", help="check everything and print what would be computed")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")
    generate.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)"
    )
    _add_fields(generate, VideoRequest, "video")
    _add_fields(generate, EngineConfig, "engine")
    _add_fields(generate, ParallelConfig, "several ranks")

    convert = _command(commands, "convert", _convert, "copy a checkpoint in a smaller dtype")
    convert.add_argument("source", metavar="SRC", help="folder or hub id")
    convert.add_argument("target", metavar="DST", help="new folder")
    convert.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    convert.add_argument("--revision", help="hub revision when the source is a hub id")

    inspect = _command(commands, "inspect", _inspect, "what a checkpoint is, and whether its files are whole")
    inspect.add_argument("model", metavar="PATH", help="folder or hub id")
    inspect.add_argument("--revision", help="hub revision when it is a hub id")

    toy = _command(commands, "toy", _toy, "write small random checkpoints to try things with")
    toy.add_argument("folder", metavar="DIR", help="gets the folders base, mid and distilled")

    bench = _command(commands, "bench", _bench, "time forwards, decoding and chunks; prints JSON")
    _add_model(bench)
    bench.add_argument("--repeats", type=int, default=3, help="calls timed per figure (default: %(default)s)")
    _add_fields(bench, VideoRequest, "video")
    _add_fields(bench, EngineConfig, "engine")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="say what is chosen and why")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint folder in the Diffusers layout, or hub id owner/name"
    )


def _add_fields(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One flag per field that has a help text; a flag not given leaves the field's default."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.default is not None:
            text += f" (default: {field.default})"
        common = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if "bool" in str(field.type):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            choices = field.metadata.get("choices")
            group.add_argument(
                flag, type=_parse_by_type(field), choices=choices, metavar=_metavar(field, choices), **common
            )


def _metavar(field: dataclasses.Field, choices: Sequence[str] | None) -> str | None:
    if choices:
        return None
    kinds = {"int": "N", "float": "X"}
    return next((mark for kind, mark in kinds.items() if str(field.type).startswith(kind)), field.name.upper())


def _parse_by_type(field: dataclasses.Field) -> Callable[[str], object]:
    kind = str(field.type)
    if field.name == "steps":
        return _steps
    if field.name == "num_frames":
        return _num_frames
    if kind.startswith("int"):
        return int
    return float if kind.startswith("float") else str


def _steps(text: str) -> int | tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def _num_frames(text: str) -> int | None:
    return None if text == "endless" else int(text)


# argparse names the converter in its message.
_steps.__name__ = "list of whole numbers"
_num_frames.__name__ = "number of frames"


def _collect(options: argparse.Namespace, cls: type) -> dict[str, object]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in vars(options).items() if name in names}


def _generate(options: argparse.Namespace) -> int:
    from helios_engine.engine.engine import resolve_device
    from helios_engine.output import check_output

    request = VideoRequest(**_collect(options, VideoRequest))
    config = EngineConfig(**_collect(options, EngineConfig))
    check_output(options.output, options.encoder, height=request.height, width=request.width)
    if request.num_frames is None and options.output.endswith(".safetensors"):
        raise ValueError("an endless video's latents cannot be held for one .safetensors file; use .mp4 or .npy")
    parallel = ParallelConfig(**_collect(options, ParallelConfig))
    if options.num_gpus < 1:
        raise ValueError(f"num-gpus must be at least 1, got {options.num_gpus}")
    checkpoint, plan = _plan(options.model, request, config)
    num_ranks = max(options.num_gpus, launch.world_size())
    degrees = launch.choose_degrees(parallel, num_ranks, guided=plan.is_guided)
    if degrees.cfg > 1 and not plan.is_guided:
        raise ValueError("cfg-degree 2 needs a guidance scale above 1")
    if options.dry_run:
        return _dry_run(checkpoint, plan, request, config, degrees)
    if options.num_gpus > 1 and launch.world_size() == 1:
        if resolve_device(config.device).type == "cuda":
            launch.check_gpus(options.num_gpus)
        return launch.start_ranks(options.num_gpus, options.arguments)
    config = dataclasses.replace(config, device=launch.own_device(config.device))
    try:
        context = launch.from_torchrun(parallel, device=config.device, guided=plan.is_guided)
        return _write_video(options, request, config, context)
    finally:
        launch.stop()


def _write_video(
    options: argparse.Namespace, request: VideoRequest, config: EngineConfig, context: ContextParallel
) -> int:
    """Load, generate, and on rank 0 write the file."""
    from helios_engine.engine.engine import Engine
    from helios_engine.output import open_writer, video_metadata

    engine = Engine.load(options.model, config, context)
    if context.size > 1 and context.is_first and not options.quiet:
        print(context.describe(), file=sys.stderr)
    with engine.stream(request, progress=context.is_first and not options.quiet) as stream:
        if not context.is_first:
            for _ in stream:
                pass
            return 0
        metadata = video_metadata(request, engine.describe(stream.session.plan))
        writer = open_writer(options.output, fps=request.fps, metadata=metadata, encoder=options.encoder)
        # Stopping an endless video by hand is its normal end, so its file is kept.
        stop = contextlib.suppress(KeyboardInterrupt) if request.num_frames is None else contextlib.nullcontext()
        with writer, stop:
            for chunk in stream:
                writer.write(chunk)
    print(options.output)
    return 0


def _plan(model: str, request: VideoRequest, config: EngineConfig) -> tuple[Checkpoint, Plan]:
    """The checkpoint's configuration and what the request makes of it; inputs are read once to see that they can be."""
    from helios_engine.engine import conditioning
    from helios_engine.engine.checkpoint import Checkpoint
    from helios_engine.engine.plan import make_plan

    checkpoint = Checkpoint.open(model, config.revision)
    plan = make_plan(
        request,
        recipe=checkpoint.recipe,
        scheduler=checkpoint.scheduler,
        model=checkpoint.model,
        has_text_encoder=checkpoint.has_text_encoder,
    )
    conditioning.load_pixels(request)
    return checkpoint, plan


def _dry_run(checkpoint: Checkpoint, plan: Plan, request: VideoRequest, config: EngineConfig, degrees: Degrees) -> int:
    from helios_engine.engine.engine import resolve_device, resolve_dtype
    from helios_engine.engine.memory import estimate_memory

    memory = estimate_memory(checkpoint, plan, config, request.max_sequence_length)
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
    print(f"forwards    {forwards[0]} in the first chunk, {forwards[1]} in each later one")
    for size, tokens in zip(plan.stage_sizes, plan.tokens_per_stage, strict=True):
        print(f"stage       latents 9x{size[0]}x{size[1]}, {tokens} noisy + {plan.history_tokens} history tokens")
    if degrees.num_ranks > 1:
        print(f"ranks       {degrees.num_ranks}: {degrees.describe()}")
    print(
        f"memory      about {memory.peak / 1e9:.2f} GB: transformer {memory.transformer / 1e9:.2f}, text encoder "
        f"{memory.text_encoder / 1e9:.2f}, VAE {memory.vae / 1e9:.2f}, prompt {memory.text_keys_values / 1e9:.2f}, "
        f"working set {max(memory.denoise_activations, memory.decode_activations) / 1e9:.2f}"
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    from helios_engine.tools.convert import convert_checkpoint

    size = convert_checkpoint(options.source, Path(options.target), options.dtype, options.revision)
    print(f"{options.target} ({size / 1e9:.3f} GB)")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from helios_engine.tools.inspect import inspect_build, inspect_checkpoint

    found = inspect_checkpoint(options.model, options.revision)
    for line in found.lines + inspect_build():
        print(line)
    if found.problems:
        raise ValueError("; ".join(found.problems))
    return 0


def _toy(options: argparse.Namespace) -> int:
    from helios_engine.tools.toy import write_toy_checkpoints

    folder = Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    for path in write_toy_checkpoints(folder):
        print(path)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from helios_engine.engine.engine import Engine
    from helios_engine.tools.bench import bench

    if options.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {options.repeats}")
    request = VideoRequest(**{"prompt": "A red fox runs through fresh snow.", **_collect(options, VideoRequest)})
    engine = Engine.load(options.model, EngineConfig(**_collect(options, EngineConfig)))
    print(json.dumps(bench(engine, request, repeats=options.repeats), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
