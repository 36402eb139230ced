"""helios-engine: generate, convert, inspect, toy, bench. Flags are the fields of EngineConfig and VideoRequest.

Bad input ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from helios_engine.engine.memory import OutOfMemory
from helios_engine.parallel import launch
from helios_engine.parallel.watch import RankFailure
from helios_engine.request import VideoRequest
from helios_engine.settings import EngineConfig, ParallelConfig

PROGRAM = "helios-engine"
BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a bad flag as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _complain(message: str, speaker: int = 0) -> None:
    if launch.own_rank() != speaker:  # all ranks know of the fault; one says it
        return
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if threading.current_thread() is threading.main_thread():
        # A polite kill ends like Ctrl-C, so that no temporary file stays behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    meeting = launch.Meeting()
    try:
        options = meeting.agreed(lambda: _parse(arguments), _facts)
        logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
        return options.run(options, meeting)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except ValueError as error:
        _complain(str(error))
        return BAD_INPUT
    except RankFailure as failure:
        _complain(str(failure), speaker=0 if failure.rank else 1)
        # A normal exit would wait for exchanges with a rank that is frozen or unreachable.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    except (OSError, OverflowError, OutOfMemory) as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("stopped")
        return INTERRUPTED


def _parse(arguments: list[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    return options


def _facts(options: argparse.Namespace) -> dict[str, str]:
    """What all ranks must have been told alike."""
    given = {name: value for name, value in vars(options).items() if name not in ("run", "arguments")}
    return {name.replace("_", "-"): str(value) for name, value in given.items()}


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
    _add_num_gpus(generate)
    generate.add_argument(
        "--checkpoint-dir", metavar="DIR", help="keep every finished chunk and the session's state in this folder"
    )
    generate.add_argument(
        "--resume", action="store_true", help="go on where the run in --checkpoint-dir stood, if there is one"
    )
    generate.add_argument(
        "--profile", metavar="TRACE.json", help="write a Chrome trace of one chunk (torch's profiler), a file per rank"
    )
    generate.add_argument(
        "--profile-chunk",
        type=int,
        metavar="N",
        help="the chunk to profile, counted from 0 (default: 1, or 0 if alone)",
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
    inspect.add_argument("model", metavar="PATH", nargs="?", help="folder or hub id")
    inspect.add_argument("--ops", action="store_true", help="which operators run here: compiled or plain torch")
    inspect.add_argument("--revision", help="hub revision when it is a hub id")

    toy = _command(commands, "toy", _toy, "write small random checkpoints to try things with")
    toy.add_argument("folder", metavar="DIR", help="gets the folders base, mid and distilled")

    bench = _command(commands, "bench", _bench, "time forwards, decoding and chunks; prints JSON")
    _add_model(bench)
    bench.add_argument("--repeats", type=int, default=3, help="calls timed per figure (default: %(default)s)")
    bench.add_argument(
        "--bytes", action="store_true", help="no times: bytes each rank sends in one forward of each stage, by purpose"
    )
    bench.add_argument(
        "--timeline",
        metavar="OUT.png",
        help="no times: draw where the time of the second chunk goes, and print the sums",
    )
    bench.add_argument(
        "--trace",
        action="store_true",
        help="no times, no weights, no GPU: launches and bytes of a forward and a decode as a GPU would run them",
    )
    _add_num_gpus(bench)
    _add_fields(bench, VideoRequest, "video")
    _add_fields(bench, EngineConfig, "engine")
    _add_fields(bench, ParallelConfig, "several ranks")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace, launch.Meeting], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="say what is chosen and why")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint folder in the Diffusers layout, or hub id owner/name"
    )


def _add_num_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)"
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


def _generate(options: argparse.Namespace, meeting: launch.Meeting) -> int:
    from helios_engine.tools.generate import generate

    return generate(options, meeting)


def _convert(options: argparse.Namespace, meeting: launch.Meeting) -> int:
    from helios_engine.tools.convert import convert_checkpoint

    size = convert_checkpoint(options.source, Path(options.target), options.dtype, options.revision)
    print(f"{options.target} ({size / 1e9:.3f} GB)")
    return 0


def _inspect(options: argparse.Namespace, meeting: launch.Meeting) -> int:
    from helios_engine.tools.inspect import inspect_build, inspect_checkpoint, inspect_operators

    if options.ops:
        for line in inspect_build() + inspect_operators():
            print(line)
        if options.model is None:
            return 0
    if options.model is None:
        raise ValueError("name a checkpoint to inspect, or ask for --ops")
    found = inspect_checkpoint(options.model, options.revision)
    for line in found.lines + inspect_build():
        print(line)
    if found.problems:
        raise ValueError("; ".join(found.problems))
    return 0


def _toy(options: argparse.Namespace, meeting: launch.Meeting) -> int:
    from helios_engine.tools.toy import write_toy_checkpoints

    folder = Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    for path in write_toy_checkpoints(folder):
        print(path)
    return 0


def _bench(options: argparse.Namespace, meeting: launch.Meeting) -> int:
    from helios_engine.tools.bench import run

    return run(options, meeting)


if __name__ == "__main__":
    sys.exit(main())
