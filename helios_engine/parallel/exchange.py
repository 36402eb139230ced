"""One exchange between ranks, from its beginning to its end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from helios_engine.parallel.watch import RankFailure, Watch
from helios_engine.trace import span

_SLICE = datetime.timedelta(seconds=0.5)  # between two looks at the peers while a CPU collective runs
# Exchanges on the CPU that were begun and not seen to end, by their work's id.
_IN_FLIGHT: dict[int, tuple[object, ...]] = {}


@atexit.register
def _never_free() -> None:
    """A rank that gives up leaves exchanges behind. gloo's threads would free their tensors after the interpreter is gone,
    which aborts the process; so these are never freed."""
    for parts in _IN_FLIGHT.values():
        for part in parts:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))


class Cuts(Protocol):
    """Takes part while work is recorded in pieces with the exchanges between them."""

    def between(self, work: Callable[[], None]) -> None:
        """End a piece, have this done there at every replay, begin the next piece."""

    def borrowed(self, x: Tensor) -> Tensor:
        """The same memory without keeping it: between pieces it is what it was when they were recorded."""


class Exchange:
    """A collective of a group that takes one tensor of this rank and fills another."""

    def __init__(
        self,
        purpose: str,
        send: Tensor,
        received: Tensor,
        collective: Callable[[Tensor, Tensor], object],
        *,
        staged: bool,
        watch: Watch | None,
    ) -> None:
        """collective(received, send) begins it and returns its work; staged sends GPU tensors through the host."""
        self._purpose, self._send, self._received = purpose, send, received
        self._collective, self._staged, self._watch = collective, staged, watch
        self._under_way: tuple[object, Tensor] | None = None

    def begin(self) -> None:
        """send must stay as it is until finish."""
        send, received = self._send, self._received
        if self._staged:
            send, received = send.cpu(), torch.empty_like(received, device="cpu")
        with span(f"exchange {self._purpose}"):
            work = self._collective(received, send)
        note_begun(work, received, send)
        self._under_way = (work, received)

    def finish(self) -> None:
        """Until everything has arrived."""
        work, received = self._under_way
        self._under_way = None
        with span("exchange wait"):
            wait_for(work, received, self._watch)
        if self._staged:
            self._received.copy_(received)

    def let_go(self, cuts: Cuts) -> None:
        """Keep no memory from now on, only where it is."""
        self._send, self._received = cuts.borrowed(self._send), cuts.borrowed(self._received)


class Pending:
    """An exchange under way; wait returns what arrived."""

    def __init__(self, received: Tensor, finish: Callable[[], None]) -> None:
        self._received, self._finish = received, finish

    def wait(self) -> Tensor:
        self._finish()
        return self._received


def note_begun(work: object, received: Tensor, *others: Tensor) -> None:
    """A collective was begun; its tensors must live until it ends."""
    if not received.is_cuda:
        _IN_FLIGHT[id(work)] = (work, received, *others)


def wait_for(work: object, received: Tensor, watch: Watch | None) -> None:
    """Wait for a collective, but not for a rank that is gone."""
    if received.is_cuda:  # orders the stream and comes back at once; the watch aborts what hangs on the device
        work.wait()
        return
    try:
        with contextlib.nullcontext() if watch is None else watch.waiting():
            while not _is_done(work):
                if watch is not None:
                    watch.check()
        _IN_FLIGHT.pop(id(work), None)
    except RankFailure:
        raise
    except RuntimeError as error:
        raise watch.explain(error) if watch is not None else error from error


def _is_done(work: object) -> bool:
    try:
        work.wait(_SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it completed meanwhile, or this says what went wrong
    return True
