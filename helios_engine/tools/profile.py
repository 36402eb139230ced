"""One chunk under torch's profiler: a Chrome trace, and a picture of where its time goes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from helios_engine.optional import require
from helios_engine.output import temporary_name

logger = logging.getLogger(__name__)
T = TypeVar("T")

CATEGORIES = ("attention", "GEMM", "elementwise", "exchange", "VAE", "gaps")
_COLOURS = {
    "attention": (222, 132, 82),
    "GEMM": (76, 114, 176),
    "elementwise": (85, 168, 104),
    "exchange": (196, 78, 82),
    "VAE": (129, 114, 179),
    "gaps": (215, 215, 215),
}
# Parts of the names of torch's operators and of GPU kernels, asked in this order.
_MARKS = (
    ("exchange", ("nccl", "gloo", "c10d", "all_to_all", "allgather", "broadcast_")),
    ("attention", ("scaled_dot_product", "flash", "fmha", "attention")),
    ("VAE", ("conv", "fprop", "implicit_gemm")),
    ("GEMM", ("aten::mm", "addmm", "bmm", "linear", "gemm", "cutlass", "nvjet", "xmma")),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """Work on the device, microseconds since the chunk began."""

    start: float
    end: float
    category: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the device did during one chunk, without overlaps; stages are (name, start, end)."""

    intervals: tuple[Interval, ...]
    stages: tuple[tuple[str, float, float], ...]
    duration: float

    def milliseconds(self) -> dict[str, float]:
        """Time per category; gaps are when the device had nothing to do."""
        totals = dict.fromkeys(CATEGORIES, 0.0)
        for interval in self.intervals:
            totals[interval.category] += (interval.end - interval.start) / 1e3
        totals["gaps"] = self.duration / 1e3 - sum(totals.values())
        return totals


def trace_path(path: Path, rank: int, num_ranks: int) -> Path:
    """Every rank its own file: trace.json, or trace.rank1.json beside others."""
    return path if num_ranks == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def check_trace(path: str) -> None:
    """Raise ValueError where a trace could not be written."""
    target = Path(path)
    if target.suffix != ".json":
        raise ValueError(f"profile {path} must end in .json; Chrome's tracing page and Perfetto read it")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"profile {path} cannot be written there")


def start_profiler() -> profile:
    """torch's profiler of the CPU, and of the GPU where there is one, running."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on standard error
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.__enter__()
    return profiler


def profiled(items: Iterator[T], index: int, keep: Callable[[profile], None]) -> Iterator[T]:
    """The same items; the making of the one called index is profiled and keep gets the profile."""
    count = 0
    while True:
        profiler = start_profiler() if count == index else None
        try:
            item = next(items, None)
        finally:
            if profiler is not None:
                profiler.__exit__(None, None, None)
        if item is None:
            break
        if profiler is not None:
            keep(profiler)
        yield item
        count += 1
    if count <= index:
        logger.warning("chunk %d was to be profiled, but only %d were made: no trace", index, count)


def write_trace(profiler: profile, path: Path) -> None:
    """Write a Chrome trace; it appears whole or not at all."""
    with _written_whole(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; the file appears under its own when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def category_of(name: str) -> str:
    """Which part of the work an operator or a GPU kernel belongs to."""
    lowered = name.lower()
    return next((category for category, marks in _MARKS if any(mark in lowered for mark in marks)), "elementwise")


def timeline_of(profiler: profile) -> Timeline:
    """The device's work in the profiled chunk: GPU kernels where there are any, else the operators that ran on the CPU."""
    events = list(profiler.events())
    # The profiler lists a range a second time as the device saw it.
    ranges = [e for e in events if e.name.startswith("helios: ") and e.device_type.name == "CPU"]
    chunk = next(event for event in ranges if event.name.startswith("helios: chunk"))
    origin, end = chunk.time_range.start, chunk.time_range.end
    kernels = [event for event in events if event.device_type.name in ("CUDA", "PrivateUse1") and event.name]
    # Copies run beside the computation (streamed weights, frames), so they would hide it.
    kernels = [event for event in kernels if not event.name.startswith(("helios: ", "Memcpy", "Memset"))]
    if kernels:
        end = max(end, *(event.time_range.end for event in kernels))
        leaves = [(event.time_range.start, event.time_range.end, category_of(event.name)) for event in kernels]
    else:
        leaves = _cpu_leaves(chunk)
    intervals, last = [], origin
    for start, stop, category in sorted(leaves):
        start, stop = max(start, last), min(stop, end)
        if stop > start:
            intervals.append(Interval(start - origin, stop - origin, category))
            last = stop
    stages = [
        (event.name.removeprefix("helios: "), event.time_range.start - origin, event.time_range.end - origin)
        for event in ranges
        if event.name.startswith(("helios: stage ", "helios: vae"))
    ]
    return Timeline(tuple(intervals), tuple(sorted(stages, key=lambda stage: stage[1])), end - origin)


def _cpu_leaves(root: object) -> list[tuple[float, float, str]]:
    """The outermost operators below our ranges; what is inside the decoder counts as the VAE's."""
    leaves: list[tuple[float, float, str]] = []
    waiting = [(root, False)]
    while waiting:
        event, is_vae = waiting.pop()
        if event.name.startswith("helios: "):
            inside = is_vae or event.name == "helios: vae"
            waiting += [(child, inside) for child in event.cpu_children]
            continue
        category = "VAE" if is_vae else category_of(event.name)
        leaves.append((event.time_range.start, event.time_range.end, category))
    return leaves


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """A PNG: the chunk from left to right in its categories' colours, stages below it, time per category below that."""
    require("PIL", "drawing a timeline", "pillow")
    from PIL import Image, ImageDraw

    width, left, strip = 1200, 110, 90
    image = Image.new(
        "RGB", (width + left + 130, 110 + strip + 14 * len(timeline.stages) + 34 * len(CATEGORIES)), "white"
    )
    canvas = ImageDraw.Draw(image)
    per_pixel = timeline.duration / width

    def x_of(time: float) -> float:
        return left + time / per_pixel

    canvas.text((left, 8), f"one chunk, {timeline.duration / 1e3:.1f} ms", fill="black")
    canvas.rectangle((left, 30, left + width, 30 + strip), fill=_COLOURS["gaps"])
    for interval in timeline.intervals:
        canvas.rectangle((x_of(interval.start), 30, x_of(interval.end), 30 + strip), fill=_COLOURS[interval.category])
    for row, (name, start, end) in enumerate(timeline.stages):  # a row each, since stages may be short
        top = 36 + strip + 14 * row
        canvas.line((x_of(start), top + 6, x_of(end), top + 6), fill="black", width=3)
        canvas.text(
            (x_of(end) + 4 if x_of(end) < left + width - 90 else left - 84, top),
            f"{name} {(end - start) / 1e3:.1f} ms",
            fill="black",
        )
    totals = timeline.milliseconds()
    longest = max(*totals.values(), 1e-9)
    for row, category in enumerate(CATEGORIES):
        top = 60 + strip + 14 * len(timeline.stages) + 34 * row
        canvas.text((8, top + 5), category, fill="black")
        canvas.rectangle((left, top, left + width * totals[category] / longest, top + 22), fill=_COLOURS[category])
        share = 100 * totals[category] * 1e3 / timeline.duration
        text = f"{totals[category]:.1f} ms, {share:.0f} %"
        canvas.text((left + width * totals[category] / longest + 6, top + 5), text, fill="black")
    with _written_whole(path) as temporary:
        image.save(temporary)
