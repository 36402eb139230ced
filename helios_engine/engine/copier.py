"""Weights from host memory to a GPU while it computes: one thread, one stream, a few pinned buffers."""

from __future__ import annotations

import atexit
import queue
import threading
from types import ModuleType

import torch
from torch import Tensor

from helios_engine.model.offload import Copier, Pairs, PlainCopier

_BUFFER_BYTES = 32 << 20
_NUM_BUFFERS = 4
_FAREWELL = 5.0  # seconds


def make_copier(device: torch.device) -> Copier:
    """The copier for a device."""
    return StreamCopier(device) if device.type == "cuda" else PlainCopier()


class StreamCopier:
    """See model.offload.Copier. Mapped files are not pinned, so their bytes pass through a small ring of pinned buffers.

    The thread touches the files' pages, so what the disk has to deliver does not hold up the computing thread either.
    api is what torch.cuda offers: Stream, Event, stream, current_stream, current_device, set_device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        buffer_bytes: int = _BUFFER_BYTES,
        num_buffers: int = _NUM_BUFFERS,
        api: ModuleType = torch.cuda,
    ) -> None:
        if device.type == "cuda" and device.index is None:  # the thread must know which of them
            device = torch.device("cuda", api.current_device())
        self._device, self._api = device, api
        self._stream = api.Stream(device)
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(num_buffers)]
        self._sent: list[object] = [None] * num_buffers  # events: this buffer's last copy has left it
        self._next = 0
        self._free: dict[int, object] = {}  # slot -> event after its last use
        self._filled: dict[int, threading.Event] = {}  # slot -> its copies are enqueued
        self._copied: dict[int, object] = {}  # slot -> event after its copies
        self._error: BaseException | None = None
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="helios-copier", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the interpreter must not end it in the middle of a copy

    def load(self, slot: int, pairs: Pairs) -> None:
        self._filled[slot] = threading.Event()
        self._work.put((slot, pairs, self._free.pop(slot, None), self._filled[slot]))

    def ready(self, slot: int) -> None:
        self._filled[slot].wait()
        if self._error is not None:
            raise RuntimeError(f"weights could not be read while streaming: {self._error}") from self._error
        self._api.current_stream(self._device).wait_event(self._copied[slot])

    def used(self, slot: int) -> None:
        event = self._api.Event()
        event.record(self._api.current_stream(self._device))
        self._free[slot] = event

    def close(self) -> None:
        """End the thread; closing twice is fine."""
        atexit.unregister(self.close)
        self._work.put(None)
        self._thread.join(timeout=_FAREWELL)
        self._buffers = []

    def _run(self) -> None:
        try:
            # A thread begins on GPU 0 and would open a context there, half a gigabyte for every rank of another GPU.
            self._api.set_device(self._device)
        except BaseException as error:  # said by the computing thread, as what cannot be read is
            self._error = error
        while (item := self._work.get()) is not None:
            self._fill(*item)
            del item  # or this thread would hold the slot's memory while it waits for the next

    def _fill(self, slot: int, pairs: Pairs, free: object, filled: threading.Event) -> None:
        try:
            if self._error is not None:
                return
            if free is not None:
                self._stream.wait_event(free)
            for target, source in pairs:
                self._send(target, source)
            event = self._api.Event()
            event.record(self._stream)
            self._copied[slot] = event
        except (
            BaseException
        ) as error:  # whatever it is, the computing thread raises it; it must not go on without weights
            self._error = error
        finally:
            pairs.clear()
            filled.set()

    def _send(self, target: Tensor, source: Tensor) -> None:
        if source.dtype != target.dtype:  # small ones only
            source = source.to(target.dtype)
        to, what = (tensor.reshape(-1).view(torch.uint8) for tensor in (target, source.contiguous()))
        size = self._buffers[0].numel()
        for start in range(0, what.numel(), size):
            part = what[start : start + size]
            index = self._next
            self._next = (index + 1) % len(self._buffers)
            if self._sent[index] is not None:
                self._sent[index].synchronize()
            buffer = self._buffers[index][: part.numel()]
            buffer.copy_(part)
            with self._api.stream(self._stream):
                to[start : start + part.numel()].copy_(buffer, non_blocking=True)
            event = self._api.Event()
            event.record(self._stream)
            self._sent[index] = event
