"""Where a chunk is decoded: in line with everything else, or on a stream of its own beside the next chunk's denoising."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

Frames = list[Tensor | None]
_STEPS_AHEAD = 1


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """Frames that may still be under way; they may be read after wait()."""

    frames: Frames
    start: Any  # marks of the lane it runs on
    end: Any
    is_done: Callable[[], bool]
    wait: Callable[[], None]


class Lane(Protocol):
    """Runs decoding and tells the time as the device sees it."""

    def mark(self) -> Any:
        """A point in the device's work, behind everything enqueued so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks the device has passed."""

    def wait_for(self, mark: Any) -> None:
        """Until the device has passed a mark."""

    def begin(self, decode: Callable[[], Frames]) -> Decoding:
        """Decode what is computed so far."""


class Pace:
    """Called after every step: lets the host enqueue one step while the device is at another, and no more.

    A recorded forward is one launch, so the host could enqueue a whole chunk in no time, and a cancel would come too late.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._marks: collections.deque[Any] = collections.deque()

    def __call__(self) -> None:
        self._marks.append(self._lane.mark())
        if len(self._marks) > _STEPS_AHEAD:
            self._lane.wait_for(self._marks.popleft())


class PlainLane:
    """Work is done when its call returns: the CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait_for(self, mark: float) -> None:
        pass

    def begin(self, decode: Callable[[], Frames]) -> Decoding:
        start = self.mark()
        return Decoding(decode(), start, self.mark(), is_done=lambda: True, wait=lambda: None)


class CudaLane:
    """Decodes on the current stream, or on its own where it overlaps.

    api is what torch.cuda offers: Stream, Event, stream, current_stream.
    """

    def __init__(self, device: torch.device, *, overlaps: bool, api: ModuleType = torch.cuda) -> None:
        self._device, self._api = device, api
        self._stream = api.Stream(device) if overlaps else None

    def mark(self) -> Any:
        event = self._api.Event(enable_timing=True)
        event.record(self._api.current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3

    def wait_for(self, mark: Any) -> None:
        mark.synchronize()

    def begin(self, decode: Callable[[], Frames]) -> Decoding:
        if self._stream is None:
            return self._enqueue(decode)
        caller = self._api.current_stream(self._device)
        self._stream.wait_stream(caller)
        with self._api.stream(self._stream):
            decoding = self._enqueue(decode)
        for frames in decoding.frames:
            if frames is not None and frames.device.type != "cpu":
                frames.record_stream(caller)  # who frees them there must not free them for the next decoding here
        return decoding

    def _enqueue(self, decode: Callable[[], Frames]) -> Decoding:
        start = self.mark()
        frames = decode()
        end = self.mark()
        return Decoding(frames, start, end, is_done=end.query, wait=end.synchronize)


def make_lane(device: torch.device, *, overlaps: bool) -> Lane:
    """The lane of a device."""
    return CudaLane(device, overlaps=overlaps) if device.type == "cuda" else PlainLane()


def why_not_overlapped(device: torch.device, *, num_ranks: int, offload: str, vae_dtype: str) -> str | None:
    """Why a chunk cannot be decoded beside the next one's denoising with these settings, or None."""
    if device.type != "cuda":
        return f"{device} does one thing at a time"
    if num_ranks > 1:
        return "several ranks decode together, between their chunks"
    if offload != "none":
        return f"with offload {offload} decoder and transformer share the memory"
    if vae_dtype == "float16":
        return "a float16 decoder waits for the check of its range"
    return None
