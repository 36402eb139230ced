"""What ranks know of each other outside the collectives, through a key-value store.

A collective that does not come back cannot say why. So every rank shows a sign of life once in a while and posts what made
it give up; the others see either, stop waiting, and name the rank and the cause.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import distributed as dist

_BEATS_PER_TIMEOUT = 30
_LONGEST_INTERVAL = 1.0  # seconds
_LONGEST_CAUSE = 500
FAREWELL = 5.0  # seconds
T = TypeVar("T")


class RankFailure(RuntimeError):
    """Another rank raised, died or fell silent. rank says which; no rank of the context can go on."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank} {cause}; the other ranks have stopped")
        self.rank, self.cause = rank, cause


class Watch:
    """One rank's view of its peers.

    store is a torch.distributed store nobody else writes to (a PrefixStore, say). With a timeout in seconds a thread
    looks after the peers: one that shows no sign of life for half of it counts as lost, so that all have ended within
    it. on_failure is then called once, from that thread. Without a timeout only exchange works.
    """

    def __init__(
        self, store: object, rank: int, size: int, *, timeout: float | None, on_failure: Callable[[], None]
    ) -> None:
        self._store, self.rank, self.size = store, rank, size
        self.timeout = timeout
        self._on_failure = on_failure
        self._failure: tuple[int, str] | None = None
        self._gone: dict[int, float] = {}  # ranks that said goodbye, and when that was seen
        self._interrupted: set[int] = set()
        self.is_interrupted = False  # this rank itself
        self._waiting_since: float | None = None
        self._all_stopped = False
        self._interrupted_at: float | None = None
        self._num_exchanges = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout is not None:
            self._thread = threading.Thread(target=self._look_after, name="helios-watch", daemon=True)
            self._thread.start()
            # The interpreter ends threads in the middle of a call into torch, which then aborts the process.
            atexit.register(self._end_thread)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this rank needs the others: one that has ended in the meantime will never come."""
        outer = self._waiting_since
        self._waiting_since = outer or time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = outer

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, in rank order; no collective. All ranks call it equally often."""
        name = f"exchange/{self._num_exchanges}"
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        pause = 0.001
        try:
            self._store.set(f"{name}/{self.rank}", text)
            with self.waiting():
                while not self._store.check(keys):
                    self.check()
                    time.sleep(pause)
                    pause = min(0.05, 2 * pause)
            texts = [self._store.get(key).decode() for key in keys]
            # Whoever posted here had read everything of the round before.
            if self._num_exchanges:
                self._store.delete_key(f"exchange/{self._num_exchanges - 1}/{self.rank}")
        except dist.DistError as error:
            raise RankFailure(0, f"cannot be heard any more ({error})") from None
        self._num_exchanges += 1
        return texts

    def agreed(self, prepare: Callable[[], T], facts: Callable[[T], Mapping[str, str]]) -> T:
        """What prepare returns, when it works on every rank and facts of it are the same on all.

        Raises ValueError on every rank, naming the rank at fault, when prepare raises ValueError or OSError on one of
        them or when facts differ.
        """
        problem: ValueError | OSError | None = None
        note: dict[str, object] = {}
        try:
            result = prepare()
            note["facts"] = dict(facts(result))
        except (ValueError, OSError) as error:
            problem = error
            note["problem"] = str(error)
        except BaseException as error:
            self.report(error)
            raise
        notes = [json.loads(text) for text in self.exchange(json.dumps(note))]
        verdict = problem or _disagreement(notes)
        if verdict is None:
            return result
        heard = f"heard/{self._num_exchanges}"
        with contextlib.suppress(dist.DistError):
            self._store.set(f"{heard}/{self.rank}", "")
        self._wait_for_all(heard + "/{}")
        raise verdict

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank gives up, and why. The first report counts.

        An interrupt says little: whoever starts the ranks interrupts all when one of them dies. So the others give
        anything else the time to show itself.
        """
        if isinstance(error, RankFailure) or self.timeout is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self.interrupt()
            return
        with contextlib.suppress(dist.DistError):  # the store went down with its host; the others notice by themselves
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_CAUSE]
            self._store.compare_set("failed", "", json.dumps([self.rank, f"failed with {cause}"]))
            self._failure = self._failure or (self.rank, f"failed with {cause}")

    def interrupt(self) -> None:
        """This rank was told to stop. Only notes it, so that a signal handler may call it; the watch's thread says it."""
        self.is_interrupted = True

    def cause_of_stop(self) -> RankFailure | None:
        """After an interrupt of this rank: the failure behind it, or None when all ranks were interrupted alike."""
        self.interrupt()
        end = time.monotonic() + (self.timeout or 0.0)
        while self._failure is None and not self._all_stopped and time.monotonic() < end:
            time.sleep(0.05)
        is_own = self._failure is None or self._failure[0] == self.rank
        return None if is_own else RankFailure(*self._failure)

    def check(self) -> None:
        """Raise RankFailure when a rank is known to have failed."""
        if self._failure is not None:
            raise RankFailure(*self._failure)

    def explain(self, error: RuntimeError) -> RankFailure:
        """The failure behind a collective that broke; waits until it is known, within the timeout."""
        end = time.monotonic() + (self.timeout or 0.0)
        while self._failure is None and self._thread is not None and time.monotonic() < end:
            # A rank that was interrupted before it ended is no fault: this one's own interrupt is on its way.
            if ended := self._gone.keys() - self._interrupted:
                return RankFailure(min(ended), "has ended while this rank still needed it")
            time.sleep(0.05)
        if self._failure is None:
            self.report(error)
        return RankFailure(*(self._failure or (self.rank, f"lost its connections: {error}")))

    def close(self) -> None:
        """Say goodbye, so that silence is not taken for a failure."""
        if self._thread is not None and not self._done.is_set():
            self._end_thread()
            atexit.unregister(self._end_thread)
            if self._failure is None:
                self._wait_for_all("left/{}")

    def _end_thread(self) -> None:
        self._done.set()
        self._thread.join(timeout=FAREWELL)

    def _wait_for_all(self, key: str) -> None:
        """On rank 0, which may hold the store up: stay a moment, until all the others have posted a key."""
        end = time.monotonic() + FAREWELL
        keys = [key.format(rank) for rank in range(1, self.size)]
        with contextlib.suppress(dist.DistError):
            while self.rank == 0 and not self._store.check(keys) and time.monotonic() < end:
                time.sleep(0.01)

    def _look_after(self) -> None:
        store = self._store.clone() if hasattr(self._store, "clone") else self._store
        interval, silence = min(self.timeout / _BEATS_PER_TIMEOUT, _LONGEST_INTERVAL), self.timeout / 2
        seen: dict[int, tuple[bytes, float]] = {}
        beat = 0
        try:
            while True:
                store.set(f"alive/{self.rank}", str(beat))
                self._say_interrupted(store)
                if self._failure is None and (found := self._find(store, seen, silence)):
                    self._failure = found
                    self._on_failure()
                if self._done.wait(interval):
                    break
                beat += 1
            self._say_interrupted(store)
            store.set(f"left/{self.rank}", "")
        except dist.DistError:
            if not self._done.is_set():
                self._failure = self._failure or (0, "or the launcher that held the run's store has gone")
                self._on_failure()

    def _say_interrupted(self, store: object) -> None:
        if self.is_interrupted:
            store.set(f"interrupted/{self.rank}", "")

    def _find(self, store: object, seen: dict[int, tuple[bytes, float]], silence: float) -> tuple[int, str] | None:
        """The failed rank and the cause, or None."""
        if store.check(["failed"]):
            rank, cause = json.loads(store.get("failed"))
            return rank, cause
        now = time.monotonic()
        gone = dict(self._gone)
        for rank in range(self.size):
            key = f"alive/{rank}"
            sign = store.get(key) if store.check([key]) else b""
            if store.check([f"left/{rank}"]):
                gone.setdefault(rank, now)
            elif rank not in seen or seen[rank][0] != sign:
                seen[rank] = (sign, now)
            elif now - seen[rank][1] > silence:
                return rank, f"has shown no sign of life for {silence:g} s: it was killed, or its machine is gone"
        # Asked after the goodbyes and published before them: an interrupted rank posts its interrupt first.
        interrupted = [rank for rank in range(self.size) if store.check([f"interrupted/{rank}"])]
        self._interrupted = set(interrupted)
        self._gone = gone
        since = self._waiting_since
        if self._gone and since is not None and now - max(since, min(self._gone.values())) > silence:
            return min(self._gone), "has ended while this rank still needed it"
        self._all_stopped = len({*self._gone, *interrupted}) == self.size
        if not interrupted or self._all_stopped:
            return None
        self._interrupted_at = self._interrupted_at or now
        is_late = now - self._interrupted_at > silence + 2 * _LONGEST_INTERVAL
        return (interrupted[0], "was interrupted") if is_late else None


def _disagreement(notes: list[dict]) -> ValueError | None:
    """What speaks against going on, if anything."""
    for rank, note in enumerate(notes):
        if "problem" in note:
            return ValueError(f"rank {rank}: {note['problem']}")
    expected = notes[0]["facts"]
    for rank, note in enumerate(notes):
        for name in sorted(expected.keys() | note["facts"].keys()):
            here, there = expected.get(name, "nothing"), note["facts"].get(name, "nothing")
            if here != there:
                return ValueError(
                    f"rank {rank} has {name} {there} where rank 0 has {here}; all ranks need the same arguments"
                )
    return None
