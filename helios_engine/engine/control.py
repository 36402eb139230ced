"""Whether a video goes on: rank 0 decides, every rank hears it at the same step boundary."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from helios_engine.parallel.context import ContextParallel


class Cancelled(Exception):
    """The video was cancelled or closed between two steps."""


class Control:
    """One video's (or one batch's) word. stop and close may come from any thread; the others from the one that computes.

    Every rank polls at the same points of the program, so rank 0 can stop between any two steps, or leave a loop the
    others are still in, without leaving them in a collective. On other ranks stop waits for rank 0's.
    """

    def __init__(self, context: ContextParallel) -> None:
        self._context = context
        self._wanted = threading.Event()
        self._over = False
        self._lock = threading.Lock()  # around what decides who sends the word
        self._computing = False

    @property
    def is_stopped(self) -> bool:
        return self._over or (self._context.is_first and self._wanted.is_set())

    def stop(self) -> None:
        """Ask for the end at the next step boundary."""
        self._wanted.set()

    def poll(self) -> bool:
        """True when the video is over; asks rank 0 unless that is known."""
        if self._computing:
            return self._ask()
        with self._lock:
            return self._ask()

    def check(self) -> None:
        """Raise Cancelled when the video is over."""
        if self.poll():
            raise Cancelled

    def complete(self) -> None:
        """The last chunk is made: over on every rank, no word needed."""
        self._over = True

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around a chunk: meanwhile this thread alone sends words, and passes on at the end what others asked for."""
        with self._lock:
            self._computing = True
        try:
            yield
        except BaseException:
            self._computing = False
            raise
        with self._lock:
            self._computing = False
            if self._wanted.is_set() and self._context.is_first:
                self._ask()

    def close(self) -> None:
        """End the video; ranks still inside it hear of it where they next poll."""
        self._wanted.set()
        with self._lock:
            if self._computing:
                return
            if self._context.is_broken or self._context.is_interrupted:  # nobody can be counted on to hear it
                self._over = True
            if not self._ask():
                self._over = True
                self._context.give_up("closed its video before rank 0 did")

    def _ask(self) -> bool:
        if not self._over:
            self._over = bool(self._context.word(int(self._wanted.is_set())))
        return self._over
