"""Who holds which tokens and which heads: pure integers, the same on every rank, so no sizes are ever exchanged.

History and noisy tokens are split separately, so every rank holds [history share | noisy share] and its part of the
noisy-only work; heads are split inside an Ulysses group. Shares may be uneven and may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


def shares(count: int, parts: int) -> tuple[int, ...]:
    """count split into parts that differ by one at most, the larger ones first."""
    quotient, remainder = divmod(count, parts)
    return tuple(quotient + (part < remainder) for part in range(parts))


def starts(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Where each part begins."""
    return (0, *accumulate(counts[:-1]))


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """One forward's tokens over num_ranks ranks, and num_heads heads over the ulysses ranks of a group.

    Ranks are numbered ring-major: rank = ring index * ulysses + ulysses index. history, noisy and heads hold each
    rank's (or group member's) share. Every rank's history and total are within one token of every other's.
    """

    num_history: int
    num_noisy: int
    num_heads: int
    num_ranks: int
    ulysses: int
    history: tuple[int, ...]
    noisy: tuple[int, ...]
    heads: tuple[int, ...]

    @classmethod
    def make(
        cls, num_history: int, num_noisy: int, num_heads: int, *, num_ranks: int, ulysses: int | None = None
    ) -> TokenLayout:
        ulysses = num_ranks if ulysses is None else ulysses
        assert num_ranks % ulysses == 0, (num_ranks, ulysses)
        history = shares(num_history, num_ranks)
        # Totals are balanced, not the noisy shares: the remainders of both splits would meet on the first ranks.
        totals = shares(num_history + num_noisy, num_ranks)
        noisy = tuple(total - own for total, own in zip(totals, history, strict=True))
        return cls(num_history, num_noisy, num_heads, num_ranks, ulysses, history, noisy, shares(num_heads, ulysses))

    def tokens(self, rank: int) -> int:
        return self.history[rank] + self.noisy[rank]

    def history_slice(self, rank: int) -> slice:
        start = starts(self.history)[rank]
        return slice(start, start + self.history[rank])

    def noisy_slice(self, rank: int) -> slice:
        start = starts(self.noisy)[rank]
        return slice(start, start + self.noisy[rank])

    def head_slice(self, member: int) -> slice:
        """Heads of the member-th rank of an Ulysses group."""
        start = starts(self.heads)[member]
        return slice(start, start + self.heads[member])

    def group(self, rank: int) -> range:
        """The ranks that exchange heads with this one, itself included."""
        first = rank - rank % self.ulysses
        return range(first, first + self.ulysses)
