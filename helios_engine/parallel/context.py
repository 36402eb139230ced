"""Ranks, their groups, and the few collectives the engine uses; each counts what it sends.

Ranks form a mesh cfg x ring x ulysses with ulysses innermost, so that neighbours, which talk most, share the fastest
links. A cfg index computes one guidance branch; the ring x ulysses ranks of it share one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist

ProcessGroup = object  # torch's own class exists only in builds with distributed support


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


class ContextParallel:
    """This process among its peers. A single process is an ordinary value with one rank and no groups."""

    def __init__(
        self,
        rank: int,
        degrees: Degrees,
        *,
        global_ranks: Sequence[int] = (0,),
        groups: dict[str, ProcessGroup] | None = None,
        control: ProcessGroup = None,
    ) -> None:
        self.rank, self.degrees = rank, degrees
        self._global_ranks = tuple(global_ranks)
        self.size = degrees.num_ranks
        self.ulysses_rank = rank % degrees.ulysses
        self.ring_rank = rank // degrees.ulysses % degrees.ring
        self.cfg_rank = rank // (degrees.ulysses * degrees.ring)
        self.traffic = Traffic()
        self._groups = groups or {}
        self._control = control

    @classmethod
    def single(cls) -> ContextParallel:
        """One process; nothing of torch.distributed is started."""
        return cls(0, Degrees(1))

    @classmethod
    def from_process_group(cls, degrees: Degrees, *, ranks: Sequence[int] | None = None) -> ContextParallel | None:
        """Groups over some ranks of a process group that somebody has initialised; all of them by default.

        Collective over the whole process group: every rank calls it, and those that are not in ranks get None. A gloo
        group is made beside the data groups for control words.
        """
        members = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        if len(members) != degrees.num_ranks:
            raise ValueError(f"{degrees.describe()} need {degrees.num_ranks} ranks, but there are {len(members)}")
        here = dist.get_rank()
        control = dist.new_group(list(members), backend="gloo")
        groups = {}
        for name, lists in _mesh(degrees).items():
            for relative in lists:  # every rank takes part in making every group
                group = dist.new_group([members[rank] for rank in relative])
                if here in members and members.index(here) in relative:
                    groups[name] = group
        if here not in members:
            return None
        return cls(members.index(here), degrees, global_ranks=members, groups=groups, control=control)

    @property
    def sequence_rank(self) -> int:
        """Index among the ranks that share one sequence."""
        return self.rank % self.sequence_size

    @property
    def sequence_size(self) -> int:
        return self.degrees.ulysses * self.degrees.ring

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that talks to the user and holds frames."""
        return self.rank == 0

    def all_to_all(self, send: Tensor, *, send_counts: list[int], receive_counts: list[int], purpose: str) -> Tensor:
        """Exchange slices of a flat buffer inside the Ulysses group; counts are elements per member."""
        received = send.new_empty(sum(receive_counts))
        own = send_counts[self.ulysses_rank]
        self.traffic.count(purpose, (send.numel() - own) * send.element_size())
        dist.all_to_all_single(received, send, receive_counts, send_counts, group=self._groups["ulysses"])
        return received

    def rotate(self, send: Tensor, receive: Tensor, purpose: str) -> list[object]:
        """Start sending a buffer to the next rank of the ring and receiving the previous one's; wait on what is returned."""
        here, ring = self.rank, self.degrees.ring
        base = here - self.ring_rank * self.degrees.ulysses
        following = base + (self.ring_rank + 1) % ring * self.degrees.ulysses
        previous = base + (self.ring_rank - 1) % ring * self.degrees.ulysses
        self.traffic.count(purpose, send.numel() * send.element_size())
        group, ranks = self._groups["ring"], self._global_ranks
        operations = []
        if send.numel():
            operations.append(dist.P2POp(dist.isend, send, ranks[following], group=group))
        if receive.numel():
            operations.append(dist.P2POp(dist.irecv, receive, ranks[previous], group=group))
        return dist.batch_isend_irecv(operations) if operations else []

    def gather_rows(self, rows_BnC: Tensor, counts: tuple[int, ...], purpose: str) -> Tensor:
        """All sequence ranks' rows in rank order, [B, sum(counts), C]; shorter shares travel padded to the longest."""
        if self.sequence_size == 1:
            return rows_BnC
        batch, own, width = rows_BnC.shape
        longest = max(counts)
        send = rows_BnC.new_zeros(batch, longest, width)
        send[:, :own] = rows_BnC
        received = _all_gather(send, len(counts), self._groups["sequence"])
        self.traffic.count(purpose, send.numel() * send.element_size() * (len(counts) - 1))
        return torch.cat([received[rank, :, :count] for rank, count in enumerate(counts)], dim=1)

    def exchange_branches(self, rows: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """(branch 0's rows, branch 1's rows) from each half's own."""
        received = _all_gather(rows, 2, self._groups["cfg"])
        self.traffic.count(purpose, rows.numel() * rows.element_size())
        return received[0], received[1]

    def word(self, value: int) -> int:
        """Rank 0's value on every rank; small, on the CPU, through the control group."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(tensor, self._global_ranks[0], group=self._control)
        return int(tensor.item())

    def describe(self) -> str:
        return f"{self.size} rank{'s' * (self.size > 1)}, {self.degrees.describe()}"


def _all_gather(send: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """Every member's equal-sized tensor, [count, *shape]."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    received = send.new_empty(count * send.numel())
    gather(received, send.reshape(-1), group=group)
    return received.view(count, *send.shape)


def _mesh(degrees: Degrees) -> dict[str, list[list[int]]]:
    """The member ranks of every group of each kind."""
    ulysses, ring, cfg = degrees.ulysses, degrees.ring, degrees.cfg
    sequence = ulysses * ring
    return {
        "sequence": [[c * sequence + s for s in range(sequence)] for c in range(cfg)],
        "ulysses": [[c * sequence + r * ulysses + u for u in range(ulysses)] for c in range(cfg) for r in range(ring)],
        "ring": [[c * sequence + r * ulysses + u for r in range(ring)] for c in range(cfg) for u in range(ulysses)],
        "cfg": [[c * sequence + s for c in range(cfg)] for s in range(sequence)],
    }
