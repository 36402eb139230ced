"""Ranks, their groups, and the few collectives the engine uses; each counts what it sends."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from helios_engine.parallel.exchange import Cuts, Exchange, Pending, note_begun, wait_for
from helios_engine.parallel.mesh import Degrees, Traffic, mesh
from helios_engine.parallel.watch import FAREWELL, RankFailure, Watch
from helios_engine.trace import span

ProcessGroup = object  # torch's own class exists only in builds with distributed support
DEFAULT_TIMEOUT = 30.0
# Rank 0 may keep the others waiting between chunks for as long as its caller likes; the watch ends a wait in vain.
_NEVER = datetime.timedelta(days=365)
T = TypeVar("T")


class ContextParallel:
    """This process among its peers. A single process is an ordinary value with one rank and no groups.

    Made by single, from_torchrun, from_process_group or from_groups.
    """

    def __init__(
        self,
        rank: int,
        degrees: Degrees,
        *,
        global_ranks: Sequence[int] = (0,),
        groups: Mapping[str, ProcessGroup] | None = None,
        control: ProcessGroup = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.degrees = rank, degrees
        self._global_ranks = tuple(global_ranks)
        self.size = degrees.num_ranks
        self.ulysses_rank = rank % degrees.ulysses
        self.ring_rank = rank // degrees.ulysses % degrees.ring
        self.cfg_rank = rank // (degrees.ulysses * degrees.ring)
        self.traffic = Traffic()
        self._groups = dict(groups or {})
        self._control = control
        self._watch = watch
        self.cuts: Cuts | None = None  # while a forward is recorded in pieces, between its exchanges

    @classmethod
    def single(cls) -> ContextParallel:
        """One process; nothing of torch.distributed is started."""
        return cls(0, Degrees(1))

    @classmethod
    def from_torchrun(
        cls,
        *,
        ulysses: int | None = None,
        ring: int | None = None,
        cfg: int | None = None,
        device: str = "auto",
        guided: bool = False,
        rank_timeout: float = DEFAULT_TIMEOUT,
    ) -> ContextParallel:
        """The ranks torchrun started, their process group initialised; a single process outside torchrun.

        Degrees left out follow Degrees.choose. See parallel/launch.py, which the command line uses too.
        """
        from helios_engine.parallel import launch
        from helios_engine.settings import ParallelConfig

        config = ParallelConfig(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, rank_timeout=rank_timeout)
        return launch.from_torchrun(config, device=launch.own_device(device), guided=guided)

    @classmethod
    def from_process_group(
        cls, degrees: Degrees, *, ranks: Sequence[int] | None = None, rank_timeout: float | None = DEFAULT_TIMEOUT
    ) -> ContextParallel | None:
        """Groups over some ranks of a process group that somebody has initialised; all of them by default.

        Collective over the whole process group: every rank calls it, and those that are not in ranks get None. A gloo
        group is made beside the data groups for control words. rank_timeout is in seconds: when a rank raises, dies
        or hangs, the others raise RankFailure within it; None leaves that to the process group's own timeout.
        """
        members = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        if len(members) != degrees.num_ranks:
            raise ValueError(f"{degrees.describe()} need {degrees.num_ranks} ranks, but there are {len(members)}")
        here = dist.get_rank()
        control = dist.new_group(list(members), backend="gloo", timeout=_NEVER)
        groups: dict[str, ProcessGroup] = {}
        made: dict[tuple[int, ...], ProcessGroup] = {}
        for name, lists in mesh(degrees).items():
            for relative in lists:  # every rank takes part in making every group
                if len(relative) == 1:  # nobody to talk to; NCCL would make a communicator
                    continue
                # Groups of the same ranks inside a forward are one; rank 0's frames and the autoencoder keep their own.
                place = tuple(relative) if name != "all" else (-1, *relative)
                if place not in made:
                    made[place] = dist.new_group([members[rank] for rank in relative])
                if here in members and members.index(here) in relative:
                    groups[name] = made[place]
        if here not in members:
            return None
        return cls._watched(members, degrees, groups, control, rank_timeout)

    @classmethod
    def from_groups(
        cls,
        *,
        ulysses: ProcessGroup = None,
        ring: ProcessGroup = None,
        cfg: ProcessGroup = None,
        sequence: ProcessGroup = None,
        everyone: ProcessGroup = None,
        control: ProcessGroup = None,
        rank_timeout: float | None = DEFAULT_TIMEOUT,
    ) -> ContextParallel:
        """A host's own process groups; a group left out has degree 1.

        sequence (ring x ulysses ranks) is needed beside both, everyone beside cfg and a sequence. control is a gloo group
        over all these ranks; left out, it is made, if they are all ranks of the default group. Raises ValueError when the
        groups do not form a cfg x ring x ulysses mesh with ulysses innermost.
        """
        given = {"ulysses": ulysses, "ring": ring, "cfg": cfg, "sequence": sequence, "all": everyone}
        given["sequence"] = sequence or _only(ulysses, ring, "sequence")
        given["all"] = everyone or _only(given["sequence"], cfg, "everyone")
        if given["all"] is None:
            return cls.single()
        members = dist.get_process_group_ranks(given["all"])
        sizes = {name: 1 if group is None else dist.get_world_size(group) for name, group in given.items()}
        degrees = Degrees(sizes["ulysses"], sizes["ring"], sizes["cfg"])
        if degrees.num_ranks != len(members):
            raise ValueError(f"{degrees.describe()} is {degrees.num_ranks} ranks, but the groups span {len(members)}")
        here = members.index(dist.get_rank())
        for name, lists in mesh(degrees).items():
            expected = [members[rank] for rank in next(ranks for ranks in lists if here in ranks)]
            found = [dist.get_rank()] if given[name] is None else dist.get_process_group_ranks(given[name])
            if found != expected:
                raise ValueError(
                    f"the {name} group holds ranks {found}, but {degrees.describe()} over ranks {members} needs {expected}"
                )
        if control is None:
            # new_group with local synchronisation names groups after how many a rank is in already, which differs.
            if len(members) < dist.get_world_size():
                raise ValueError(
                    f"control is needed: a gloo group over ranks {members}, which are not all ranks there are"
                )
            control = dist.new_group(members, backend="gloo", timeout=_NEVER)
        groups = {name: group for name, group in given.items() if group is not None}
        return cls._watched(tuple(members), degrees, groups, control, rank_timeout)

    @classmethod
    def _watched(
        cls,
        members: tuple[int, ...],
        degrees: Degrees,
        groups: dict[str, ProcessGroup],
        control: ProcessGroup,
        rank_timeout: float | None,
    ) -> ContextParallel:
        if len(members) == 1:
            return cls(0, degrees, global_ranks=members, groups=groups, control=control)
        token = torch.tensor([secrets.randbits(62)])
        dist.broadcast(token, members[0], group=control)
        # The store behind the default group: on every rank already, and there is no public way to it.
        store = dist.PrefixStore(f"helios/{token.item()}", dist.distributed_c10d._get_default_store())
        rank = members.index(dist.get_rank())

        def abort() -> None:
            for group in {id(group): group for group in groups.values()}.values():
                if dist.get_backend(group) == "nccl":  # its kernels would wait for the lost rank for ever
                    # Each by itself: NCCL ends a communicator only once no recorded step refers to it.
                    backend = group._get_backend(torch.device("cuda"))
                    thread = threading.Thread(target=backend.abort, daemon=True)
                    thread.start()
                    atexit.register(thread.join, FAREWELL)  # ended in the middle of a call it would abort the process

        watch = Watch(store, rank, len(members), timeout=rank_timeout, on_failure=abort)
        return cls(rank, degrees, global_ranks=members, groups=groups, control=control, watch=watch)

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

    @property
    def is_broken(self) -> bool:
        """True once a rank has failed: nothing more can be exchanged."""
        return self._watch is not None and self._watch.has_failed

    @property
    def is_interrupted(self) -> bool:
        """True once this rank was told to stop: the others may be anywhere, so nothing is agreed with them any more."""
        return self._watch is not None and self._watch.is_interrupted

    def interrupt(self) -> None:
        """Note that this rank was told to stop, as by Ctrl-C; a signal handler may call it."""
        if self._watch is not None:
            self._watch.interrupt()

    def agreed(self, prepare: Callable[[], T], facts: Callable[[T], Mapping[str, str]]) -> T:
        """What prepare returns, when it works on every rank and facts of it are equal on all; no collective.

        Raises ValueError on every rank when one rank's prepare raises ValueError or OSError, or facts differ.
        """
        return prepare() if self._watch is None else self._watch.agreed(prepare, facts)

    @contextlib.contextmanager
    def guard(self, expected: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Around work that talks to other ranks: what this rank raises inside, the others hear of.

        expected are exceptions that all ranks raise together.
        """
        if self._watch is None:
            yield
            return
        self._watch.check()
        try:
            with self._watch.waiting():
                yield
            self._watch.check()  # an aborted exchange on a GPU ends as if it had worked
        except expected:
            raise
        except BaseException as error:
            if self._watch.has_failed and isinstance(error, RuntimeError):
                self._watch.check()  # what an aborted exchange raises says nothing
            self._watch.report(error)
            raise

    def give_up(self, reason: str) -> None:
        """Tell the other ranks that this one leaves their common program."""
        if self._watch is not None:
            self._watch.report(RuntimeError(reason))

    def cause_of_stop(self) -> RankFailure | None:
        """After this rank was interrupted: the other rank's failure that led to it, if that was it."""
        return None if self._watch is None else self._watch.cause_of_stop()

    def exchange_text(self, text: str) -> list[str]:
        """Every rank's text in rank order; for small facts, away from the data groups."""
        return [text] if self._watch is None else self._watch.exchange(text)

    def all_to_all(
        self, send: Tensor, *, send_counts: list[int], receive_counts: list[int], purpose: str, group: str = "ulysses"
    ) -> Tensor:
        """Exchange slices of a flat buffer inside a group; counts are elements per member. In a group of one that is a copy."""
        if len(send_counts) == 1:  # no such group is made
            self.traffic.count(purpose, 0)
            return send.clone()
        received, exchange = self._all_to_all(send, send_counts, receive_counts, purpose, group)
        self._do(exchange, begins=True, finishes=True)
        return received

    def start_all_to_all(
        self, send: Tensor, *, send_counts: list[int], receive_counts: list[int], purpose: str, group: str
    ) -> Pending:
        """The same, under way while the caller goes on; send must stay as it is until wait."""
        received, exchange = self._all_to_all(send, send_counts, receive_counts, purpose, group)
        self._do(exchange, begins=True)
        return Pending(received, lambda: self._do(exchange, finishes=True))

    def _all_to_all(
        self, send: Tensor, send_counts: list[int], receive_counts: list[int], purpose: str, group: str
    ) -> tuple[Tensor, Exchange]:
        own = send_counts[self._index(group)]
        self.traffic.count(purpose, (send.numel() - own) * send.element_size())
        received, members = send.new_empty(sum(receive_counts)), self._groups[group]

        def collective(received: Tensor, send: Tensor) -> object:
            return dist.all_to_all_single(received, send, receive_counts, send_counts, group=members, async_op=True)

        return received, self._exchange(purpose, send, received, collective, group)

    def rotate(self, send: Tensor, num_arriving: int, purpose: str) -> Pending:
        """Pass a flat buffer to the next rank of the ring and take the previous one's, num_arriving elements."""
        ring = self.degrees.ring
        following, previous = (self.ring_rank + 1) % ring, (self.ring_rank - 1) % ring
        send_counts, receive_counts = [0] * ring, [0] * ring
        send_counts[following], receive_counts[previous] = send.numel(), num_arriving
        return self.start_all_to_all(
            send, send_counts=send_counts, receive_counts=receive_counts, purpose=purpose, group="ring"
        )

    def gather_rows(self, rows_BnC: Tensor, counts: Sequence[int], purpose: str, *, group: str = "sequence") -> Tensor:
        """All members' rows in rank order, [B, sum(counts), C]; shorter shares travel padded to the longest."""
        if len(counts) == 1:
            return rows_BnC
        batch, own, width = rows_BnC.shape
        send = rows_BnC.new_zeros(batch, max(counts), width)
        send[:, :own] = rows_BnC
        received = self._all_gather(send, len(counts), purpose, group)
        return torch.cat([received[rank, :, :count] for rank, count in enumerate(counts)], dim=1)

    def collect_on_first(self, rows: Tensor, counts: Sequence[int], purpose: str) -> Tensor | None:
        """Rank 0 of all gets every rank's rows [sum(counts), ...] in rank order, the others None."""
        unit = rows[0].numel() if len(rows) else 0
        send_counts, receive_counts = [0] * self.size, [0] * self.size
        send_counts[0] = rows.numel()
        if self.is_first:
            receive_counts = [count * unit for count in counts]
        received = self.all_to_all(
            rows.reshape(-1), send_counts=send_counts, receive_counts=receive_counts, purpose=purpose, group="all"
        )
        return received.view(sum(counts), *rows.shape[1:]) if self.is_first else None

    def exchange_branches(self, rows: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """(branch 0's rows, branch 1's rows) from each half's own."""
        received = self._all_gather(rows, 2, purpose, "cfg")
        return received[0], received[1]

    def broadcast(self, tensor: Tensor, purpose: str) -> Tensor:
        """Rank 0's tensor on every rank; the others pass one of the same shape and dtype, which is overwritten."""
        if self.size == 1:
            return tensor
        if self.is_first:
            self.traffic.count(purpose, tensor.numel() * tensor.element_size() * (self.size - 1))
        staged = tensor.contiguous()
        if self._is_staged(tensor, "all"):
            staged = staged.cpu()
        with span(f"exchange {purpose}"):
            work = dist.broadcast(staged, self._global_ranks[0], group=self._groups["all"], async_op=True)
            note_begun(work, staged)
            wait_for(work, staged, self._watch)
        return staged.to(tensor.device)

    def word(self, value: int) -> int:
        """Rank 0's value on every rank; small, on the CPU, through the control group."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        self._tell(tensor)
        return int(tensor.item())

    def share_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank, through the control group; the others pass None."""
        if self.size == 1:
            return data
        length = self.word(len(data) if self.is_first else 0)
        buffer = torch.empty(length, dtype=torch.uint8)
        if self.is_first and length:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._tell(buffer)
        return buffer.numpy().tobytes()

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers (64 bits each, as many on all), in rank order, through the control group."""
        if self.size == 1:
            return [list(numbers)]
        send = torch.tensor(list(numbers), dtype=torch.int64)
        received = torch.empty(self.size * len(send), dtype=torch.int64)
        work = _gather_function()(received, send, group=self._control, async_op=True)
        note_begun(work, received, send)
        wait_for(work, received, self._watch)
        return received.view(self.size, -1).tolist()

    def all_agree(self, answer: bool) -> bool:
        """True where every rank says so; through the control group."""
        return all(number for (number,) in self.gather_numbers([int(answer)]))

    @property
    def exchanges(self) -> str:
        """What ranks talk through inside a forward, "nccl" or another; "" where there is one rank."""
        if self.size == 1:
            return ""
        backends = sorted({dist.get_backend(group) for group in self._groups.values() if group is not None})
        return next((name for name in backends if name != "nccl"), "nccl")

    def describe(self) -> str:
        return f"{self.size} rank{'s' * (self.size > 1)}, {self.degrees.describe()}"

    def close(self) -> None:
        """Stop looking after the other ranks; the process groups are their maker's to end."""
        if self._watch is not None:
            self._watch.close()

    def _tell(self, tensor: Tensor) -> None:
        work = dist.broadcast(tensor, self._global_ranks[0], group=self._control, async_op=True)
        note_begun(work, tensor)
        wait_for(work, tensor, self._watch)

    def _index(self, group: str) -> int:
        indices = {"ulysses": self.ulysses_rank, "ring": self.ring_rank, "cfg": self.cfg_rank, "all": self.rank}
        return self.sequence_rank if group == "sequence" else indices[group]

    def _is_staged(self, tensor: Tensor, group: str) -> bool:
        """Whether a tensor travels through the host: gloo has no exchange of GPU memory for every call."""
        return tensor.is_cuda and dist.get_backend(self._groups[group]) == "gloo"

    def _all_gather(self, send: Tensor, count: int, purpose: str, group: str) -> Tensor:
        """Every member's equal-sized tensor, [count, *shape]."""
        self.traffic.count(purpose, send.nbytes * (count - 1))
        flat, members = send.reshape(-1), self._groups[group]
        received = flat.new_empty(count * flat.numel())

        def collective(received: Tensor, send: Tensor) -> object:
            return _gather_function()(received, send, group=members, async_op=True)

        self._do(self._exchange(purpose, flat, received, collective, group), begins=True, finishes=True)
        return received.view(count, *send.shape)

    def _exchange(
        self,
        purpose: str,
        send: Tensor,
        received: Tensor,
        collective: Callable[[Tensor, Tensor], object],
        group: str,
    ) -> Exchange:
        staged = self._is_staged(send, group)
        return Exchange(purpose, send, received, collective, staged=staged, watch=self._watch)

    def _do(self, exchange: Exchange, *, begins: bool = False, finishes: bool = False) -> None:
        """Here and now; while a forward is recorded in pieces, between two of them at every replay."""
        parts = [exchange.begin] * begins + [exchange.finish] * finishes

        def work() -> None:
            for part in parts:
                part()

        if self.cuts is None:
            work()
            return
        self.cuts.between(work)
        if finishes:
            exchange.let_go(self.cuts)


def _gather_function() -> Callable[..., object]:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def _only(first: ProcessGroup, second: ProcessGroup, name: str) -> ProcessGroup:
    """The one that is given, None for neither. Both need a group over their product."""
    if first is not None and second is not None:
        raise ValueError(f"two kinds of groups need the group over both as well; give {name}")
    return first or second
