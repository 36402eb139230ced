"""Whether a video goes on: rank 0 decides, every rank hears it at the same step boundary."""

from __future__ import annotations

import threading

from helios_engine.parallel.context import ContextParallel


class Cancelled(Exception):
    """The video was cancelled or closed between two steps."""


class Control:
    """One video's (or one batch's) word. stop may come from any thread; the others from the thread that computes.

    Every rank calls poll and close at the same points of the program, so rank 0 can stop between any two steps, or
    leave a loop the others are still in, without leaving them in a collective. On other ranks stop waits for rank 0's.
    """

    def __init__(self, context: ContextParallel) -> None:
        self._context = context
        self._wanted = threading.Event()
        self._over = False

    @property
    def is_stopped(self) -> bool:
        return self._over or (self._context.is_first and self._wanted.is_set())

    def stop(self) -> None:
        """Ask for the end at the next step boundary."""
        self._wanted.set()

    def poll(self) -> bool:
        """True when the video is over; asks rank 0 unless that is known."""
        if not self._over:
            self._over = bool(self._context.word(int(self._wanted.is_set())))
        return self._over

    def check(self) -> None:
        """Raise Cancelled when the video is over."""
        if self.poll():
            raise Cancelled

    def complete(self) -> None:
        """The last chunk is made: over on every rank, no word needed."""
        self._over = True

    def close(self) -> None:
        """End the video; ranks still inside it hear of it where they next poll."""
        self._wanted.set()
        if self._context.is_broken:  # nobody is left to hear it
            self._over = True
        self.poll()
