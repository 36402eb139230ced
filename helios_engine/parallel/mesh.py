"""How many ranks do what, which ranks make up which group, and what was sent: plain values, no communication.

Ranks form a mesh cfg x ring x ulysses with ulysses innermost, so that neighbours, which talk most, share the fastest
links. A cfg index computes one guidance branch; the ring x ulysses ranks of it share one sequence.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ranks split heads (ulysses), rotate keys (ring), and compute guidance branches (cfg)."""

    ulysses: int
    ring: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring", "cfg"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} degree must be a whole number of at least 1, got {value!r}")
        if self.cfg > 2:
            raise ValueError(f"cfg degree must be 1 or 2 (there are two guidance branches), got {self.cfg}")

    @property
    def num_ranks(self) -> int:
        return self.ulysses * self.ring * self.cfg

    def describe(self) -> str:
        return f"ulysses {self.ulysses} x ring {self.ring} x cfg {self.cfg}"

    @classmethod
    def choose(
        cls,
        num_ranks: int,
        *,
        guided: bool,
        ulysses: int | None = None,
        ring: int | None = None,
        cfg: int | None = None,
    ) -> Degrees:
        """Fill in what was left open: guided models put the two branches on two halves first, the rest is Ulysses.

        Raises ValueError when the product of the degrees is not num_ranks.
        """
        if cfg is None:
            fixed = (ulysses or 1) * (ring or 1)
            splits = guided and num_ranks % (2 * fixed) == 0
            cfg = 2 if splits and (ulysses is None or num_ranks == 2 * fixed) else 1
        ring = 1 if ring is None else ring
        if ulysses is None:
            ulysses = max(1, num_ranks // max(1, cfg * ring))
        degrees = cls(ulysses, ring, cfg)
        if degrees.num_ranks != num_ranks:
            raise ValueError(f"{degrees.describe()} is {degrees.num_ranks} ranks, but {num_ranks} were started")
        return degrees


@dataclass(slots=True)
class Traffic:
    """Bytes this rank sent to others, and collective calls, by purpose."""

    bytes_sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def count(self, purpose: str, num_bytes: int) -> None:
        self.bytes_sent[purpose] += num_bytes
        self.calls[purpose] += 1

    def add(self, other: Traffic) -> None:
        """Count what was counted once as having happened again."""
        self.bytes_sent.update(other.bytes_sent)
        self.calls.update(other.calls)

    @contextlib.contextmanager
    def apart(self) -> Iterator[Traffic]:
        """Count what happens inside in the traffic given, and not here."""
        before = Traffic(self.bytes_sent.copy(), self.calls.copy())
        inside = Traffic()
        try:
            yield inside
        finally:
            inside.bytes_sent.update(self.bytes_sent - before.bytes_sent)
            inside.calls.update(self.calls - before.calls)
            for own, kept in ((self.bytes_sent, before.bytes_sent), (self.calls, before.calls)):
                own.clear()
                own.update(kept)


def mesh(degrees: Degrees) -> dict[str, list[list[int]]]:
    """The member ranks of every group of each kind."""
    ulysses, ring, cfg = degrees.ulysses, degrees.ring, degrees.cfg
    sequence = ulysses * ring
    return {
        "all": [list(range(degrees.num_ranks))],
        "sequence": [[c * sequence + s for s in range(sequence)] for c in range(cfg)],
        "ulysses": [[c * sequence + r * ulysses + u for u in range(ulysses)] for c in range(cfg) for r in range(ring)],
        "ring": [[c * sequence + r * ulysses + u for r in range(ring)] for c in range(cfg) for u in range(ulysses)],
        "cfg": [[c * sequence + s for c in range(cfg)] for s in range(sequence)],
    }
